// Causal attention on Hopper (compute capability 9.0), also in documents: bf16, heads of QK_WIDTH (128 or 192) for queries
// and keys, of 128 for values. hopper.py launches it. All results are deterministic.
//
// Queries and keys are read in two parts, the last 64 columns by maps of their own: there the rotated part lies, of keys one for
// all heads (`own_last` 0) or one for each (1).
//
// A block has three warp groups: of the first one thread copies tiles to shared memory (TMA), the others compute, 64 rows
// of a tile each (wgmma). Barriers `full` and `empty` hand a stage of shared memory back and forth between them.
//
//   hopper_forward           128 queries; keys and values from the diagonal down, 128 at a time
//   hopper_row_sums          delta, the sum over a head of out * its gradient, and lse in powers of two, both padded to tiles
//   hopper_backward_keys     128 keys and values; queries from the diagonal on, 64 at a time. The gradients of the scores, which
//                            are computed here alone, go to a workspace in 16 bits
//   hopper_backward_queries  256 queries: the workspace's tiles times the keys
//
// The workspace holds tiles of 64 queries x 64 keys as they lie in shared memory: rows of queries, swizzled. Of each 64
// keys there are the same 64 queries and all later ones:
//
//              keys    0   1   2
//     queries  0       0
//              1       1   3             the numbers are the order in memory, for each head
//              2       2   4   5
//
// Adding the queries' gradients up by atomics instead would take the time of a forward pass, in an order that differs.
#ifndef EMULATED  // by a test, on a CPU
#include "hopper_instructions.cuh"
#endif

constexpr int D = QK_WIDTH, DV = 128;
constexpr int TILE = 128 * 128, HALF = 64 * 128;       // bytes of 64 columns of 128 and of 64 rows
constexpr int Q_TILES = D / 64, V_TILES = DV / 64;     // of 64 columns
constexpr int OUT_BYTES = 2048;                        // of shared memory, in which a warp turns its results into rows
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct Place {
  int block, head;
};

// The tile of a block or turn: tiles in groups of heads, whose inputs stay in the L2 cache; in a group, those with the most
// work first, which are the last queries or, if `up`, the first keys.
__device__ __forceinline__ Place place_of(int turn, int blocks, int heads, int group, bool up) {
  const int first = turn / (group * blocks) * group;
  const int here = min(group, heads - first), rest = turn - first * blocks;
  return {up ? rest / here : blocks - 1 - rest / here, first + rest % here};
}

// d = a b^T over WIDTH columns, in tiles of 64 that are A_NEXT and B_NEXT bytes apart.
template <int WIDTH, int A_NEXT, int B_NEXT, int I = 0, int N> __device__ __forceinline__ void product(float (&d)[N], u32 a, u32 b) {
  constexpr int A_ADD = (I / 4 * A_NEXT + I % 4 * 32) / 16, B_ADD = (I / 4 * B_NEXT + I % 4 * 32) / 16;
  if constexpr (I == 0) mma_new<A_ADD, B_ADD>(d, by_columns(a), by_columns(b));
  else mma<A_ADD, B_ADD>(d, by_columns(a), by_columns(b));
  if constexpr (I + 1 < WIDTH / 16) product<WIDTH, A_NEXT, B_NEXT, I + 1>(d, a, b);
}
// d += a b over ROWS rows of b, whose tiles of 64 columns are NEXT bytes apart; a in registers. d = a b if not `add`.
template <int ROWS, int NEXT, int I = 0, int N> __device__ __forceinline__ void add_product(float (&d)[N], const u32* a, u32 b, int add = 1) {
  mma_rows<I * 2048 / 16>(d, a + 4 * I, by_rows(b, NEXT), I > 0 || add);
  if constexpr (I + 1 < ROWS / 16) add_product<ROWS, NEXT, I + 1>(d, a, b, add);
}
// The same over 64 rows, a in shared memory.
template <int NEXT, int I = 0, int N> __device__ __forceinline__ void add_product_of_tile(float (&d)[N], u32 a, u32 b) {
  mma_rows<I * 32 / 16, I * 2048 / 16>(d, by_columns(a), by_rows(b, NEXT));
  if constexpr (I + 1 < 4) add_product_of_tile<NEXT, I + 1>(d, a, b);
}

// 16 rows of a warp, WIDTH columns of accumulators (times `factor` per row half), to global memory in rows of 16-bit
// numbers `pitch` apart, of which the first `rows` are there; the last 64 columns to `last`. `stage`: 2 KB of this warp.
template <int N> __device__ __forceinline__ void store_rows(
    const float (&d)[N], float factor0, float factor1, u32 stage, u16* to, long pitch, u16* last, long last_pitch, int rows) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int part = 0; part < N / 32; ++part) {
    const int row = (lane & 7) + (lane & 8);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const int i = part * 32 + j * 4, chunk = j + (lane >> 4);
      store_matrices(stage + row * 128 + ((chunk ^ (row & 7)) << 4), pack(d[i] * factor0, d[i + 1] * factor0),
                     pack(d[i + 2] * factor1, d[i + 3] * factor1), pack(d[i + 4] * factor0, d[i + 5] * factor0),
                     pack(d[i + 6] * factor1, d[i + 7] * factor1));
    }
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      const int r = pass * 4 + (lane >> 3), chunk = lane & 7;
      const uint4 x = load_shared(stage + r * 128 + ((chunk ^ (r & 7)) << 4));
      u16* row_to = part < N / 32 - 1 ? to + r * pitch + part * 64 : last + r * last_pitch;
      if (r < rows) *(uint4*)(row_to + chunk * 8) = x;
    }
    __syncwarp();
  }
}

// A tile of queries or keys to tiles of 64 columns in shared memory, `next` bytes apart: the first ones by one map, the last by
// another, in which `last_head` is the head.
__device__ __forceinline__ void load_heads(
    u32 to, u32 next, const TensorMap* first, const TensorMap* last, u32 bar, int head, int last_head, int token, int batch) {
  for (int i = 0; i < Q_TILES - 1; ++i) tma_load(to + i * next, first, bar, 64 * i, head, token, batch);
  tma_load(to + (Q_TILES - 1) * next, last, bar, 0, last_head, token, batch);
}
__device__ __forceinline__ void load_values(u32 to, u32 next, const TensorMap* map, u32 bar, int head, int token, int batch) {
  for (int i = 0; i < V_TILES; ++i) tma_load(to + i * next, map, bar, 64 * i, head, token, batch);
}

namespace of_forward {
constexpr int STAGES = 2;
constexpr int Q_AT = 0, K_AT = Q_TILES * TILE, V_AT = K_AT + STAGES * Q_TILES * TILE, OUT_AT = V_AT + STAGES * V_TILES * TILE,
              BAR_AT = OUT_AT + 8 * OUT_BYTES;
}  // namespace of_forward

// A tile's scores, in powers of two, to weights; the sums of both rows grow by them.
__device__ __forceinline__ void weigh(float (&s)[64], float scale_log2, float highest0, float highest1, float& total0, float& total1) {
  const float m0 = highest0 * scale_log2, m1 = highest1 * scale_log2;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    s[4 * j] = exp2_fast(s[4 * j] * scale_log2 - m0);
    s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale_log2 - m0);
    s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale_log2 - m1);
    s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale_log2 - m1);
    total0 += s[4 * j] + s[4 * j + 1];
    total1 += s[4 * j + 2] + s[4 * j + 3];
  }
}
// The maximum of each row and what was the highest before: of four threads each.
__device__ __forceinline__ void raise(const float (&s)[64], float& highest0, float& highest1) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    highest0 = fmaxf(highest0, fmaxf(s[4 * j], s[4 * j + 1]));
    highest1 = fmaxf(highest1, fmaxf(s[4 * j + 2], s[4 * j + 3]));
  }
#pragma unroll
  for (int i = 1; i < 3; ++i) {
    highest0 = fmaxf(highest0, __shfl_xor_sync(~0u, highest0, i));
    highest1 = fmaxf(highest1, __shfl_xor_sync(~0u, highest1, i));
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) hopper_forward(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap q_last, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap k_last, const __grid_constant__ TensorMap v_map, u16* __restrict__ out,
    float* __restrict__ lse, const int* __restrict__ starts, int* __restrict__ counter, int own_last, int batch, int heads,
    int seq_len, float scale_log2, int group) {
  using namespace of_forward;
  extern __shared__ __align__(1024) char shared[];
  const u32 base = smem_address(shared);
  // Offsets of barriers, 8 bytes each.
  const u32 q_full = base + BAR_AT, q_empty = q_full + 8, k_full = q_full + 16, k_empty = k_full + 8 * STAGES,
            v_full = k_empty + 8 * STAGES, v_empty = v_full + 8 * STAGES, t_full = v_empty + 8 * STAGES, t_empty = t_full + 16;
  volatile int* next_tiles = (volatile int*)(shared + BAR_AT + 240);
  const int wg = threadIdx.x >> 7, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int blocks = (seq_len + 127) / 128, all_heads = batch * heads, total = blocks * all_heads;
  if (threadIdx.x == 0) {
    prefetch_map(&q_map);
    prefetch_map(&k_map);
    prefetch_map(&v_map);
    barrier_init(q_full, 1);
    barrier_init(q_empty, 8);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(k_full + 8 * s, 1);
      barrier_init(v_full + 8 * s, 1);
      barrier_init(k_empty + 8 * s, 8);
      barrier_init(v_empty + 8 * s, 8);
    }
    for (int s = 0; s < 2; ++s) {
      barrier_init(t_full + 8 * s, 1);
      barrier_init(t_empty + 8 * s, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (wg == 0) {
    fewer_registers<40>();
    if (threadIdx.x == 0) {
      int tile = blockIdx.x, stage = 0, phase = 0;
      for (int n = 0;; ++n) {
        barrier_wait(t_empty + 8 * (n & 1), ((n >> 1) & 1) ^ 1);
        next_tiles[n & 1] = tile;
        barrier_arrive(t_full + 8 * (n & 1));
        if (tile >= total) break;
        const int next = gridDim.x + atomicAdd(counter, 1);
        const Place t = place_of(tile, blocks, all_heads, group, false);
        const int batch_at = t.head / heads, head = t.head % heads;
        const int first = DOCUMENTS ? starts[(long)batch_at * seq_len + t.block * 128] / 128 : 0;
        barrier_wait(q_empty, (n & 1) ^ 1);
        barrier_expect(q_full, Q_TILES * TILE);
        load_heads(base + Q_AT, TILE, &q_map, &q_last, q_full, head, head, t.block * 128, batch_at);
        for (int block = t.block; block >= first; --block) {
          barrier_wait(k_empty + 8 * stage, phase ^ 1);
          barrier_expect(k_full + 8 * stage, Q_TILES * TILE);
          load_heads(base + K_AT + stage * Q_TILES * TILE, TILE, &k_map, &k_last, k_full + 8 * stage, head, head * own_last, block * 128, batch_at);
          barrier_wait(v_empty + 8 * stage, phase ^ 1);
          barrier_expect(v_full + 8 * stage, V_TILES * TILE);
          load_values(base + V_AT + stage * V_TILES * TILE, TILE, &v_map, v_full + 8 * stage, head, block * 128, batch_at);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
        tile = next;
      }
    }
    return;
  }

  more_registers<232>();
  const u32 q = base + Q_AT + (wg - 1) * HALF;
  const u32 own_stage = base + OUT_AT + (warp - 4) * OUT_BYTES;
  // The row of the first half of this thread's accumulators in a tile of queries, the column in an eighth.
  const int row = (warp - 4) * 16 + (lane >> 2), column = (lane & 3) * 2;
  if (wg == 2) named_arrive(1, 256);
  int stage = 0, phase = 0;
  for (int n = 0;; ++n) {
    barrier_wait(t_full + 8 * (n & 1), (n >> 1) & 1);
    const int tile = next_tiles[n & 1];
    __syncwarp();
    if (lane == 0) barrier_arrive(t_empty + 8 * (n & 1));
    if (tile >= total) break;
    const Place t = place_of(tile, blocks, all_heads, group, false);
    const int batch_at = t.head / heads, head = t.head % heads;
    const int query = t.block * 128 + row;
    int first = 0, newest = 0, start0 = 0, start1 = 0;
    if (DOCUMENTS) {
      const int* own = starts + (long)batch_at * seq_len;
      first = own[t.block * 128] / 128;
      newest = own[min(t.block * 128 + 128, seq_len) - 1];
      start0 = own[min(query, seq_len - 1)];
      start1 = own[min(query + 8, seq_len - 1)];
    }
    float o[64], s[64];
    u32 p[32];
    const float NEVER = -__int_as_float(0x7f800000);

    // The diagonal's tile: each query sees itself there, so that the running maximum is finite from here on.
    barrier_wait(q_full, n & 1);
    barrier_wait(k_full + 8 * stage, phase);
    wgmma_fence();
    product<D, TILE, TILE>(s, q, base + K_AT + stage * Q_TILES * TILE);
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
    if (lane == 0) barrier_arrive(k_empty + 8 * stage);
    if (t.block == first && lane == 0) barrier_arrive(q_empty);
    {
      const int limit0 = row - column, limit1 = limit0 + 8;  // of 8 j + e
      const int from0 = start0 - t.block * 128 - column, from1 = start1 - t.block * 128 - column;
#pragma unroll
      for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e > limit0 || (DOCUMENTS && 8 * j + e < from0)) s[4 * j + e] = NEVER;
          if (8 * j + e > limit1 || (DOCUMENTS && 8 * j + e < from1)) s[4 * j + 2 + e] = NEVER;
        }
    }
    float highest0 = NEVER, highest1 = NEVER, total0 = 0.f, total1 = 0.f;
    raise(s, highest0, highest1);
    weigh(s, scale_log2, highest0, highest1, total0, total1);
#pragma unroll
    for (int i = 0; i < 32; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);

    int v_stage = stage, v_phase = phase, add = 0;
    if (++stage == STAGES) stage = 0, phase ^= 1;
#pragma unroll 1
    for (int block = t.block - 1; block >= first; --block) {
      barrier_wait(k_full + 8 * stage, phase);
      named_sync(wg, 256);
      hold(o);
      hold(p);
      wgmma_fence();
      product<D, TILE, TILE>(s, q, base + K_AT + stage * Q_TILES * TILE);
      wgmma_commit();
      barrier_wait(v_full + 8 * v_stage, v_phase);
      add_product<128, TILE>(o, p, base + V_AT + v_stage * V_TILES * TILE, add);
      wgmma_commit();
      named_arrive(3 - wg, 256);
      wgmma_wait<1>();
      hold(s);
      if (lane == 0) {
        barrier_arrive(k_empty + 8 * stage);
        if (block == first) barrier_arrive(q_empty);
      }
      if (DOCUMENTS && block * 128 < newest) {
        const int from0 = start0 - block * 128 - column, from1 = start1 - block * 128 - column;
#pragma unroll
        for (int j = 0; j < 16; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            if (8 * j + e < from0) s[4 * j + e] = NEVER;
            if (8 * j + e < from1) s[4 * j + 2 + e] = NEVER;
          }
      }
      float new0 = highest0, new1 = highest1;
      raise(s, new0, new1);
      const float shrink0 = exp2_fast((highest0 - new0) * scale_log2), shrink1 = exp2_fast((highest1 - new1) * scale_log2);
      highest0 = new0, highest1 = new1;
      total0 *= shrink0, total1 *= shrink1;
      weigh(s, scale_log2, highest0, highest1, total0, total1);
      wgmma_wait<0>();
      hold(o);
      hold(p);
      if (lane == 0) barrier_arrive(v_empty + 8 * v_stage);
#pragma unroll
      for (int i = 0; i < 32; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        o[4 * j] *= shrink0, o[4 * j + 1] *= shrink0;
        o[4 * j + 2] *= shrink1, o[4 * j + 3] *= shrink1;
      }
      add = 1;
      v_stage = stage, v_phase = phase;
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }
    barrier_wait(v_full + 8 * v_stage, v_phase);
    hold(o);
    hold(p);
    wgmma_fence();
    add_product<128, TILE>(o, p, base + V_AT + v_stage * V_TILES * TILE, add);
    wgmma_commit();
    total0 += __shfl_xor_sync(~0u, total0, 1);
    total1 += __shfl_xor_sync(~0u, total1, 1);
    total0 += __shfl_xor_sync(~0u, total0, 2);
    total1 += __shfl_xor_sync(~0u, total1, 2);
    if (column == 0) {
      float* to = lse + ((long)batch_at * heads + head) * seq_len;
      if (query < seq_len) to[query] = (highest0 * scale_log2 + log2_fast(total0)) * LN_2;
      if (query + 8 < seq_len) to[query + 8] = (highest1 * scale_log2 + log2_fast(total1)) * LN_2;
    }
    wgmma_wait<0>();
    hold(o);
    if (lane == 0) barrier_arrive(v_empty + 8 * v_stage);
    const int first_row = t.block * 128 + (warp - 4) * 16;
    u16* to = out + (((long)batch_at * seq_len + first_row) * heads + head) * DV;
    store_rows(o, 1.f / total0, 1.f / total1, own_stage, to, (long)heads * DV, to + DV - 64, (long)heads * DV, seq_len - first_row);
  }
}

__device__ __forceinline__ long tile_of(int key_tile, int query_tile, int tiles) {  // the first of a head is 0
  return (long)key_tile * tiles - (long)key_tile * (key_tile - 1) / 2 + (query_tile - key_tile);
}

// out, grad_out [B, T, H, 128] -> delta, lse2 [B, H, padded]. 16 threads a head of a token.
extern "C" __global__ void __launch_bounds__(256) hopper_row_sums(
    const u16* __restrict__ out, const u16* __restrict__ grad_out, const float* __restrict__ lse, float* __restrict__ lse2,
    float* __restrict__ delta, int batch, int heads, int seq_len, int padded) {
  const long row = (long)blockIdx.x * 16 + (threadIdx.x >> 4);
  const int lane = threadIdx.x & 15;
  const int head = row % heads;
  const int token = row / heads % padded, b = row / heads / padded;
  if (b >= batch) return;
  float sum = 0.f;
  if (token < seq_len) {
    const long at = (((long)b * seq_len + token) * heads + head) * DV + lane * 8;
    const uint4 x = *(const uint4*)(out + at), y = *(const uint4*)(grad_out + at);
    const u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += low_of(xs[i]) * low_of(ys[i]) + high_of(xs[i]) * high_of(ys[i]);
  }
  // All 16 threads of a row are here, but those of the warp's other row may not be.
  const u32 mask = 0xFFFFu << (threadIdx.x & 16);
#pragma unroll
  for (int i = 8; i > 0; i /= 2) sum += __shfl_xor_sync(mask, sum, i);
  if (lane == 0) {
    const long own = (long)b * heads + head;
    delta[own * padded + token] = sum;
    // No weight of a query outside of the sequence is more than zero.
    lse2[own * padded + token] = token < seq_len ? lse[own * seq_len + token] * LOG2_E : __int_as_float(0x7f800000);
  }
}

namespace of_keys {
constexpr int STAGES = 2;
constexpr int K_AT = 0, V_AT = Q_TILES * TILE, Q_AT = V_AT + V_TILES * TILE, DO_AT = Q_AT + STAGES * Q_TILES * HALF,
              DS_AT = DO_AT + STAGES * V_TILES * HALF, SUMS_AT = DS_AT + 2 * HALF, BAR_AT = SUMS_AT + STAGES * 512;
}  // namespace of_keys

// Grid: tiles of 128 keys times `here`, the heads of this launch from `first_head` on.
extern "C" __global__ void __launch_bounds__(384, 1) hopper_backward_keys(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap q_last, const __grid_constant__ TensorMap do_map,
    const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap k_last, const __grid_constant__ TensorMap v_map,
    const float* __restrict__ lse2, const float* __restrict__ delta, const int* __restrict__ ends, u16* __restrict__ dk,
    u16* __restrict__ dk_last, u16* __restrict__ dv, int dk_width, int dk_last_width, int dv_width, char* __restrict__ workspace,
    int own_last, int first_head, int here, int group, int heads, int seq_len, int padded, float scale, float scale_log2) {
  using namespace of_keys;
  extern __shared__ __align__(1024) char shared[];
  const u32 base = smem_address(shared);
  const u32 own_full = base + BAR_AT, full = own_full + 8, empty = full + 8 * STAGES;
  const int wg = threadIdx.x >> 7, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Place place = place_of(blockIdx.x, (seq_len + 127) / 128, here, group, true);
  const int both = first_head + place.head, batch = both / heads, head = both % heads;
  const int first_key = place.block * 128, tiles = (seq_len + 63) / 64;
  const int end = DOCUMENTS ? ends[(long)batch * seq_len + min(first_key + 128, seq_len) - 1] : seq_len;
  const int first_tile = place.block * 2, end_tile = (end + 63) / 64;
  if (threadIdx.x == 0) {
    prefetch_map(&q_map);
    prefetch_map(&do_map);
    barrier_init(own_full, 1);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (wg == 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      barrier_expect(own_full, (Q_TILES + V_TILES) * TILE);
      load_heads(base + K_AT, TILE, &k_map, &k_last, own_full, head, head * own_last, first_key, batch);
      load_values(base + V_AT, TILE, &v_map, own_full, head, first_key, batch);
      int stage = 0, phase = 0;
      for (int tile = first_tile; tile < end_tile; ++tile) {
        const u32 bar = full + 8 * stage;
        barrier_wait(empty + 8 * stage, phase ^ 1);
        barrier_expect(bar, (Q_TILES + V_TILES) * HALF + 512);
        load_heads(base + Q_AT + stage * Q_TILES * HALF, HALF, &q_map, &q_last, bar, head, head, tile * 64, batch);
        const long at = (long)both * padded + tile * 64;
        bulk_load(base + SUMS_AT + stage * 512, lse2 + at, 256, bar);
        load_values(base + DO_AT + stage * V_TILES * HALF, HALF, &do_map, bar, head, tile * 64, batch);
        bulk_load(base + SUMS_AT + stage * 512 + 256, delta + at, 256, bar);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  more_registers<240>();
  const int half = wg - 1, w = warp & 3, key_tile = first_tile + half;
  const u32 k = base + K_AT + half * HALF, v = base + V_AT + half * HALF, ds_at = base + DS_AT + half * HALF;
  const int row = w * 16 + (lane >> 2), column = (lane & 3) * 2, key = key_tile * 64 + row;
  int end0 = 0, end1 = 0, oldest = 0;
  if (DOCUMENTS) {
    const int* own = ends + (long)batch * seq_len;
    end0 = own[min(key, seq_len - 1)];
    end1 = own[min(key + 8, seq_len - 1)];
    oldest = own[min(key_tile * 64, seq_len - 1)];
  }
  // Where this thread's lanes store their part of transposed matrices: 16 keys of this warp in rows of queries.
  const u32 to_row = ((lane >> 4) << 3) + (lane & 7), to_chunk = 2 * w + ((lane >> 3) & 1);
  const u32 ds_to = ds_at + to_row * 128 + ((to_chunk ^ (to_row & 7)) << 4);
  char* to = workspace + ((long)place.head * (((long)tiles + 1) * tiles / 2) + tile_of(key_tile, key_tile, tiles)) * HALF;

  float grad_v[DV / 2], grad_k[D / 2], s[32];
  u32 p[16], ds[16];
#pragma unroll
  for (int i = 0; i < DV / 2; ++i) grad_v[i] = 0.f;
#pragma unroll
  for (int i = 0; i < D / 2; ++i) grad_k[i] = 0.f;

  int stage = 0, phase = 0, tile = first_tile;
  barrier_wait(own_full, 0);
  if (half == 1) {  // its keys are later than the first 64 queries
    barrier_wait(full, 0);
    if (lane == 0) barrier_arrive(empty);
    ++tile;
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
#pragma unroll 1
  for (; tile < end_tile; ++tile) {
    const u32 q = base + Q_AT + stage * Q_TILES * HALF, grad_out = base + DO_AT + stage * V_TILES * HALF, sums = base + SUMS_AT + stage * 512 + column * 4;
    float dp[32];
    barrier_wait(full + 8 * stage, phase);
    wgmma_fence();
    product<D, TILE, HALF>(s, k, q);
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 l = load_shared2(sums + j * 32);
      s[4 * j] = exp2_fast(s[4 * j] * scale_log2 - l.x);
      s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale_log2 - l.y);
      s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale_log2 - l.x);
      s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale_log2 - l.y);
    }
    if (tile == key_tile || (DOCUMENTS && tile * 64 + 63 >= oldest)) {
      const int from0 = key - tile * 64 - column, to0 = DOCUMENTS ? end0 - tile * 64 - column : 64,
                to1 = DOCUMENTS ? end1 - tile * 64 - column : 64;
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (8 * j + e < from0 || (DOCUMENTS && 8 * j + e >= to0)) s[4 * j + e] = 0.f;
          if (8 * j + e < from0 + 8 || (DOCUMENTS && 8 * j + e >= to1)) s[4 * j + 2 + e] = 0.f;
        }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
    hold(p);
    hold(grad_v);
    wgmma_fence();
    product<DV, TILE, HALF>(dp, v, grad_out);
    wgmma_commit();
    add_product<64, HALF>(grad_v, p, grad_out);
    wgmma_commit();
    wgmma_wait<1>();
    hold(dp);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 l = load_shared2(sums + 256 + j * 32);
      ds[2 * j] = pack(low_of(p[2 * j]) * (dp[4 * j] - l.x), high_of(p[2 * j]) * (dp[4 * j + 1] - l.y));
      ds[2 * j + 1] = pack(low_of(p[2 * j + 1]) * (dp[4 * j + 2] - l.x), high_of(p[2 * j + 1]) * (dp[4 * j + 3] - l.y));
    }
    // This matmul runs while the tile goes out to the workspace.
    hold(ds);
    hold(grad_k);
    wgmma_fence();
    add_product<64, HALF>(grad_k, ds, q);
    wgmma_commit();
    if (w == 0 && lane == 0) bulk_wait_read<0>();
    named_sync(1 + half, 128);
#pragma unroll
    for (int i = 0; i < 4; ++i) store_matrices_transposed(ds_to + i * 2048, ds[4 * i], ds[4 * i + 1], ds[4 * i + 2], ds[4 * i + 3]);
    fence_async_proxy();
    named_sync(1 + half, 128);
    if (w == 0 && lane == 0) {
      bulk_store(to + (long)(tile - key_tile) * HALF, ds_at, HALF);
      bulk_commit();
    }
    wgmma_wait<0>();
    hold(p);
    hold(ds);
    hold(grad_v);
    hold(grad_k);
    // All threads have read this stage's sums, because they met above.
    if (lane == 0) barrier_arrive(empty + 8 * stage);
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
  if (w == 0 && lane == 0) bulk_wait_read<0>();
  named_sync(1 + half, 128);
  const int rows = seq_len - (key_tile * 64 + w * 16);
  const long at = ((long)batch * seq_len + key_tile * 64 + w * 16) * heads + head;
  // A head's keys and values may lie in one row, and the last part of its keys elsewhere.
  const long dv_pitch = (long)heads * dv_width;
  store_rows(grad_v, 1.f, 1.f, ds_at + w * OUT_BYTES, dv + at * dv_width, dv_pitch, dv + at * dv_width + DV - 64, dv_pitch, rows);
  store_rows(grad_k, scale, scale, ds_at + w * OUT_BYTES, dk + at * dk_width, (long)heads * dk_width, dk_last + at * dk_last_width,
             (long)heads * dk_last_width, rows);
}

namespace of_queries {
constexpr int STAGES = 3;
constexpr int DS_AT = 0, K_AT = STAGES * 4 * HALF, OUT_AT = K_AT + STAGES * Q_TILES * HALF, BAR_AT = OUT_AT + 8 * OUT_BYTES;
}  // namespace of_queries

// Key tiles up to `last`: a += tile of the first 64 queries * keys if A, b += the second's if B; passes over others.
template <int A, int B> __device__ __forceinline__ void add_keys(
    float (&a)[D / 2], float (&b)[D / 2], int& key_tile, int last, int& stage, int& phase, int& before, u32 full, u32 empty, u32 ds, u32 keys) {
#pragma unroll 1
  for (; key_tile <= last; ++key_tile) {
    barrier_wait(full + 8 * stage, phase);
    const u32 d = ds + stage * 4 * HALF, k = keys + stage * Q_TILES * HALF;
    if (A) hold(a);
    if (B) hold(b);
    wgmma_fence();
    if (A) add_product_of_tile<HALF>(a, d, k);
    if (B) add_product_of_tile<HALF>(b, d + HALF, k);
    wgmma_commit();
    // The stage before is free once its matmuls are done; this one's go on.
    wgmma_wait<1>();
    if (before >= 0 && (threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * before);
    before = stage;
    if (++stage == of_queries::STAGES) stage = 0, phase ^= 1;
  }
  if (DOCUMENTS) wgmma_wait<0>();
  if (DOCUMENTS && A) hold(a);
  if (DOCUMENTS && B) hold(b);
}

// Grid: tiles of 256 queries times `here`, the heads of this launch. Warp groups 1 and 2 have 128 queries each.
extern "C" __global__ void __launch_bounds__(384, 1) hopper_backward_queries(
    const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap k_last, const int* __restrict__ starts,
    const char* __restrict__ workspace, u16* __restrict__ dq, int own_last, int first_head, int here, int group, int heads, int seq_len, float scale) {
  using namespace of_queries;
  extern __shared__ __align__(1024) char shared[];
  const u32 base = smem_address(shared);
  const u32 full = base + BAR_AT, empty = full + 8 * STAGES;
  const int wg = threadIdx.x >> 7, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Place place = place_of(blockIdx.x, (seq_len + 255) / 256, here, group, false);
  const int both = first_head + place.head, batch = both / heads, head = both % heads;
  const int tiles = (seq_len + 63) / 64, block = place.block, first_tile = block * 4,
            last_tile = min(first_tile + 3, tiles - 1);
  const int* own = starts + (long)batch * seq_len;
  const int first = DOCUMENTS ? own[first_tile * 64] / 64 : 0;
  if (threadIdx.x == 0) {
    prefetch_map(&k_map);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 8);
    }
    fence_barrier_init();
  }
  __syncthreads();

  if (wg == 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) {
      int stage = 0, phase = 0;
      const char* from = workspace + (long)place.head * (((long)tiles + 1) * tiles / 2) * HALF;
      for (int key_tile = first; key_tile <= last_tile; ++key_tile) {
        const u32 bar = full + 8 * stage;
        const int tile = max(first_tile, key_tile), count = last_tile - tile + 1;
        barrier_wait(empty + 8 * stage, phase ^ 1);
        barrier_expect(bar, (Q_TILES + count) * HALF);
        bulk_load(base + DS_AT + (stage * 4 + tile - first_tile) * HALF, from + tile_of(key_tile, tile, tiles) * HALF, count * HALF, bar);
        load_heads(base + K_AT + stage * Q_TILES * HALF, HALF, &k_map, &k_last, bar, head, head * own_last, key_tile * 64, batch);
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  more_registers<240>();
  const int w = warp & 3, tile0 = first_tile + (wg - 1) * 2, tile1 = tile0 + 1;
  const int first0 = tile0 < tiles ? (DOCUMENTS ? own[tile0 * 64] / 64 : 0) : tiles;
  const int first1 = tile1 < tiles ? (DOCUMENTS ? own[tile1 * 64] / 64 : 0) : tiles;
  float a[D / 2], b[D / 2];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) a[i] = 0.f, b[i] = 0.f;
  int stage = 0, phase = 0, before = -1, key_tile = first;
  const u32 ds = base + DS_AT + (wg - 1) * 2 * HALF, k = base + K_AT;
  if (DOCUMENTS) add_keys<0, 0>(a, b, key_tile, min(first0 - 1, last_tile), stage, phase, before, full, empty, ds, k);
  if (DOCUMENTS) add_keys<1, 0>(a, b, key_tile, min(first1 - 1, tile0), stage, phase, before, full, empty, ds, k);
  add_keys<1, 1>(a, b, key_tile, min(tile0, last_tile), stage, phase, before, full, empty, ds, k);
  add_keys<0, 1>(a, b, key_tile, min(tile1, last_tile), stage, phase, before, full, empty, ds, k);
  add_keys<0, 0>(a, b, key_tile, last_tile, stage, phase, before, full, empty, ds, k);
  wgmma_wait<0>();
  hold(a);
  hold(b);
  const u32 own_stage = base + OUT_AT + (warp - 4) * OUT_BYTES;
  const long pitch = (long)heads * D;
  const int row = tile0 * 64 + w * 16;
  u16* to = dq + (((long)batch * seq_len + row) * heads + head) * D;
  store_rows(a, scale, scale, own_stage, to, pitch, to + D - 64, pitch, seq_len - row);
  to += 64 * pitch;
  store_rows(b, scale, scale, own_stage, to, pitch, to + D - 64, pitch, seq_len - row - 64);
}
