// Sliding-window attention with sinks and documents on Hopper (compute capability 9.0): bf16, heads of WIDTH (64, 96 or
// 128). hopper_window.py launches it; masks.py has the rule which keys a query sees. All results are deterministic.
//
// Tiles have 64 tokens. The latest keys that a tile of queries sees are some tiles that end with its own (`near`). Before
// those it sees only sinks, and those of one document, that of its first query ("far" keys), 16 at a time:
//
//            document                near_of                own
//     keys   [ sinks | . . . . . . | 64 | 64 | 64 | 64 | 64 ]       . not read: no query of the tile sees them
//                                                    queries
//
//   hopper_window_forward       output and lse, with a running softmax
//   hopper_window_grad_query    gradients of queries, delta (the sum over a head of out * its gradient), lse in powers of
//                               two, and each tile's contribution to the gradients of its far keys and values
//   hopper_window_grad_key      gradients of keys and values: of near queries, and the sum of those contributions
//
// The backward pass computes scores twice, because a pass that keeps the gradients of keys and of queries at once has to
// move one of them: 0.1 ms more in memory traffic (heads of 96, 16 sequences of 2,048), as much as the second matmuls.
//
// A block takes items in turn: tiles of one head, one for each of its warp groups. One thread of warp group 0 copies (TMA).
// Barriers `full` and `empty` hand a stage of shared memory back and forth.
#ifndef EMULATED  // by a test, on a CPU
#include "hopper_instructions.cuh"
#endif

// Warp groups that compute.
#define FORWARD_GROUPS (WIDTH < 128 ? 3 : 2)
#define QUERY_GROUPS (WIDTH < 96 ? 3 : 2)
#define KEY_GROUPS (WIDTH < 96 ? 3 : 2)

constexpr int D = WIDTH;
constexpr int PARTS = (D + 63) / 64, PART = 64 * 128, TILE = PARTS * PART;  // of 64 columns, bytes of one, of all
constexpr int FAR = 16, FAR_PART = FAR * 128;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
// Of a thread that computes, and of one that copies: of all warp groups together what the block has at its start.
template <int GROUPS> constexpr int REGISTERS = GROUPS == 2 ? 232 : 160;
template <int GROUPS> constexpr int FEW = GROUPS == 2 ? 40 : 32;

// d = a b^T over a head's width, a and b in shared memory.
template <int I = 0> __device__ __forceinline__ void product(float (&d)[32], u32 a, u32 b) {
  constexpr int ADD = (I / 4 * PART + I % 4 * 32) / 16;
  if constexpr (I == 0) mma_new<ADD, ADD>(d, by_columns(a), by_columns(b));
  else mma<ADD, ADD>(d, by_columns(a), by_columns(b));
  if constexpr (I + 1 < D / 16) product<I + 1>(d, a, b);
}
// d = a b^T over a head's width, a in registers, N rows of b.
template <int N, int I = 0> __device__ __forceinline__ void product_of(float* d, const u32* a, u32 b) {
  mma_columns<N, (I > 0), (I / 4 * PART + I % 4 * 32) / 16>(d, a + 4 * I, by_columns(b));
  if constexpr (I + 1 < D / 16) product_of<N, I + 1>(d, a, b);
}
// d += a b over ROWS rows of b, a in registers; d = a b if not `add`.
template <int ROWS, int I = 0> __device__ __forceinline__ void add_product(float (&d)[D / 2], const u32* a, u32 b, int add = 1) {
  add_rows<D, I * 2048 / 16>(d, a + 4 * I, by_rows(b, PART), I > 0 || add);
  if constexpr (I + 1 < ROWS / 16) add_product<ROWS, I + 1>(d, a, b, add);
}
// d = a^T b^T over 64 rows of a and columns of b.
template <int I = 0> __device__ __forceinline__ void product_transposed(float (&d)[8], u32 a, u32 b) {
  mma_transposed<(I > 0), I * 2048 / 16, I * 32 / 16>(d, by_rows(a, PART), by_columns(b));
  if constexpr (I + 1 < 4) product_transposed<I + 1>(d, a, b);
}
// 16 rows of a warp of a tile, as operand a of matmuls.
__device__ __forceinline__ void load_rows(u32 (&a)[D / 4], u32 tile) {
  const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5 & 3) * 16 + (lane & 15);
#pragma unroll
  for (int i = 0; i < D / 16; ++i)
    load_matrices(a + 4 * i, tile + i / 4 * PART + row * 128 + ((((i % 4) * 2 + (lane >> 4)) ^ (row & 7)) << 4));
}
// And back: accumulators of a warp group, times a factor per row half, to a tile.
__device__ __forceinline__ void put_rows(const float (&d)[D / 2], float factor0, float factor1, u32 tile) {
  const int lane = threadIdx.x & 31, row = (threadIdx.x >> 5 & 3) * 16 + (lane & 15);
#pragma unroll
  for (int j = 0; j < D / 8; j += 2)
    store_matrices(tile + j / 8 * PART + row * 128 + (((j % 8 + (lane >> 4)) ^ (row & 7)) << 4),
                   pack(d[4 * j] * factor0, d[4 * j + 1] * factor0), pack(d[4 * j + 2] * factor1, d[4 * j + 3] * factor1),
                   pack(d[4 * j + 4] * factor0, d[4 * j + 5] * factor0), pack(d[4 * j + 6] * factor1, d[4 * j + 7] * factor1));
}
__device__ __forceinline__ void load_tile(u32 to, const TensorMap* map, u32 bar, int head, int token, int batch) {
  for (int i = 0; i < PARTS; ++i) tma_load(to + i * PART, map, bar, 64 * i, head, token, batch);
}
__device__ __forceinline__ void store_tile(const TensorMap* map, u32 from, int head, int token, int batch) {
  for (int i = 0; i < PARTS; ++i) tma_store(map, from + i * PART, 64 * i, head, token, batch);
}

struct Rule {
  const int* starts;  // of this sequence
  int seq_len, tiles, window, sink;
};
__device__ __forceinline__ int document_of(const Rule& rule, int tile) { return DOCUMENTS ? rule.starts[tile * 64] : 0; }
// The first near tile of a tile of queries, whose first query's document is `document`.
__device__ __forceinline__ int near_of(const Rule& rule, int tile, int document) {
  return max(tile * 64 - rule.window + 1, document) / 64;
}
// The document of a tile's far keys, or -1: it has none.
__device__ __forceinline__ int far_of(const Rule& rule, int tile) {
  const int document = document_of(rule, tile);
  return near_of(rule, tile, document) * 64 > document ? document : -1;
}

// A stage of shared memory and its phase, in turn.
template <int STAGES> struct Turn {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};
// A step that is another warp group's.
template <int STAGES> __device__ __forceinline__ void pass_over(Turn<STAGES>& at, u32 full, u32 empty) {
  barrier_wait(full + 8 * at.stage, at.phase);
  if ((threadIdx.x & 31) == 0) barrier_arrive(empty + 8 * at.stage);
  at.next();
}
// The copies of keys and values for `tile`, or of far ones from token `far` on.
template <int STAGES> __device__ __forceinline__ void load_keys(
    Turn<STAGES>& at, u32 stages, u32 full, u32 empty, const TensorMap* k_map, const TensorMap* v_map, int bytes, int head,
    int token, int batch) {
  const u32 bar = full + 8 * at.stage, to = stages + at.stage * 2 * TILE;
  barrier_wait(empty + 8 * at.stage, at.phase ^ 1);
  barrier_expect(bar, 2 * PARTS * bytes);
  load_tile(to, k_map, bar, head, token, batch);
  load_tile(to + TILE, v_map, bar, head, token, batch);
  at.next();
}

// What of a tile of keys two rows of a thread see: columns up to `limit`, from `from` on, or sinks from `sink` to `sink_to`.
struct Seen {
  int limit0, from0, sink0, limit1, from1, sink1, sinks;
};
template <int N> __device__ __forceinline__ void mask(float (&s)[N], const Seen& seen, bool has_sinks, float otherwise) {
  if (has_sinks) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 8 * j + e;
        const bool sink0 = c >= seen.sink0 && c < seen.sink0 + seen.sinks, sink1 = c >= seen.sink1 && c < seen.sink1 + seen.sinks;
        if (c > seen.limit0 || (c < seen.from0 && !sink0)) s[4 * j + e] = otherwise;
        if (c > seen.limit1 || (c < seen.from1 && !sink1)) s[4 * j + 2 + e] = otherwise;
      }
  } else {
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int c = 8 * j + e;
        if (c > seen.limit0 || c < seen.from0) s[4 * j + e] = otherwise;
        if (c > seen.limit1 || c < seen.from1) s[4 * j + 2 + e] = otherwise;
      }
  }
}
// Two queries of a thread, `query` and 8 later.
struct Queries {
  int first, query, column, start0, start1, newest;  // `newest`: the start of the tile's last query
  __device__ __forceinline__ Queries(const Rule& rule, int tile) {
    const int lane = threadIdx.x & 31;
    first = tile * 64, query = first + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2), column = (lane & 3) * 2;
    start0 = start1 = newest = 0;
    if (DOCUMENTS) {
      start0 = rule.starts[min(query, rule.seq_len - 1)];
      start1 = rule.starts[min(query + 8, rule.seq_len - 1)];
      newest = rule.starts[min(first + 63, rule.seq_len - 1)];
    }
  }
  // Whether some query sees not all keys of a tile.
  __device__ __forceinline__ bool is_masked(const Rule& rule, int tile) const {
    return tile * 64 == first || tile * 64 < first + 64 - rule.window || (DOCUMENTS && tile * 64 < newest);
  }
  __device__ __forceinline__ bool has_sinks(const Rule& rule, int tile) const {
    return tile * 64 < first + 64 - rule.window && tile * 64 < newest + rule.sink;
  }
  __device__ __forceinline__ Seen sees(const Rule& rule, int tile) const {
    const int at = tile * 64 + column;
    return {query - at, max(start0, query - rule.window + 1) - at, start0 - at,
            query + 8 - at, max(start1, query + 9 - rule.window) - at, start1 - at, rule.sink};
  }
  // Far keys from the `sink`th on, all before the tile `near`.
  __device__ __forceinline__ Seen sees_far(const Rule& rule, int document, int near, int sink) const {
    const int last = min(rule.sink, near * 64 - document) - sink - column - 1;
    return {start0 == document ? last : -1, 0, 0, start1 == document ? last : -1, 0, 0, 0};
  }
};

// Scores to weights; the sums of both rows grow by them.
template <int N> __device__ __forceinline__ void weigh(float (&s)[N], float scale_log2, float highest0, float highest1, float& total0, float& total1) {
  const float m0 = highest0 * scale_log2, m1 = highest1 * scale_log2;
#pragma unroll
  for (int j = 0; j < N / 4; ++j) {
    s[4 * j] = exp2_fast(s[4 * j] * scale_log2 - m0);
    s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale_log2 - m0);
    s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale_log2 - m1);
    s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale_log2 - m1);
    total0 += s[4 * j] + s[4 * j + 1];
    total1 += s[4 * j + 2] + s[4 * j + 3];
  }
}
// The maximum of each row and what was the highest before: of four threads each.
template <int N> __device__ __forceinline__ void raise(const float (&s)[N], float& highest0, float& highest1) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j) {
    highest0 = fmaxf(highest0, fmaxf(s[4 * j], s[4 * j + 1]));
    highest1 = fmaxf(highest1, fmaxf(s[4 * j + 2], s[4 * j + 3]));
  }
#pragma unroll
  for (int i = 1; i < 3; ++i) {
    highest0 = fmaxf(highest0, __shfl_xor_sync(~0u, highest0, i));
    highest1 = fmaxf(highest1, __shfl_xor_sync(~0u, highest1, i));
  }
}
template <int N> __device__ __forceinline__ void pack_all(u32 (&p)[N], const float (&s)[2 * N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

namespace of_forward {
constexpr int GROUPS = FORWARD_GROUPS, STAGES = WIDTH > 64 ? 4 : 6;
constexpr int Q_AT = 0, KV_AT = Q_AT + GROUPS * TILE, OUT_AT = KV_AT + STAGES * 2 * TILE, BAR_AT = OUT_AT + GROUPS * TILE;
}  // namespace of_forward

// Grid: any; an item is GROUPS tiles of queries of a head.
extern "C" __global__ void __launch_bounds__(128 * FORWARD_GROUPS + 128, 1) hopper_window_forward(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    const __grid_constant__ TensorMap far_k_map, const __grid_constant__ TensorMap far_v_map,
    const __grid_constant__ TensorMap out_map, float* __restrict__ lse, const int* __restrict__ starts, int batch, int heads,
    int members, int seq_len, int window, int sink, float scale_log2) {
  using namespace of_forward;
  extern __shared__ __align__(1024) char shared[];
  const u32 base = smem_address(shared), stages = base + KV_AT;
  const u32 q_full = base + BAR_AT, q_empty = q_full + 8, full = q_full + 16, empty = full + 8 * STAGES;
  const int wg = threadIdx.x >> 7, lane = threadIdx.x & 31;
  const int tiles = (seq_len + 63) / 64, blocks = (tiles + GROUPS - 1) / GROUPS, items = blocks * batch * heads;
  if (threadIdx.x == 0) {
    prefetch_map(&q_map);
    prefetch_map(&k_map);
    prefetch_map(&v_map);
    barrier_init(q_full, 1);
    barrier_init(q_empty, 4 * GROUPS);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * GROUPS);
    }
    fence_barrier_init();
  }
  __syncthreads();

  Turn<STAGES> at;
  if (wg == 0) {
    fewer_registers<FEW<GROUPS>>();
    if (threadIdx.x == 0) {
      for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x, ++n) {
        const int both = item / blocks, b = both / heads, head = both % heads, key_head = head / members;
        const Rule rule{starts + (long)b * seq_len, seq_len, tiles, window, sink};
        const int first = item % blocks * GROUPS, end = min(first + GROUPS, tiles);
        barrier_wait(q_empty, (n & 1) ^ 1);
        barrier_expect(q_full, GROUPS * TILE);
        for (int u = 0; u < GROUPS; ++u) load_tile(base + Q_AT + u * TILE, &q_map, q_full, head, (first + u) * 64, b);
        for (int tile = end - 1; tile >= near_of(rule, first, document_of(rule, first)); --tile)
          load_keys(at, stages, full, empty, &k_map, &v_map, PART, key_head, tile * 64, b);
        for (int tile = first, before = -1; tile < end; ++tile) {
          const int far = far_of(rule, tile);
          for (int s = 0; far != before && far >= 0 && s < sink; s += FAR)
            load_keys(at, stages, full, empty, &far_k_map, &far_v_map, FAR_PART, key_head, far + s, b);
          before = far;
        }
      }
    }
    return;
  }

  more_registers<REGISTERS<GROUPS>>();
  const u32 own_out = base + OUT_AT + (wg - 1) * TILE;
  const float NEVER = -__int_as_float(0x7f800000);
  for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x, ++n) {
    const int both = item / blocks, b = both / heads, head = both % heads;
    const Rule rule{starts + (long)b * seq_len, seq_len, tiles, window, sink};
    const int first = item % blocks * GROUPS, end = min(first + GROUPS, tiles), own = first + wg - 1;
    const int earliest = near_of(rule, first, document_of(rule, first));
    u32 q[D / 4], p[16];
    barrier_wait(q_full, n & 1);
    load_rows(q, base + Q_AT + (wg - 1) * TILE);
    __syncwarp();
    if (lane == 0) barrier_arrive(q_empty);
    int tile = end - 1;
    if (own >= tiles) {  // nothing to do here
      for (; tile >= earliest; --tile) pass_over(at, full, empty);
      for (int each = first, before = -1; each < end; ++each) {
        const int far = far_of(rule, each);
        for (int s = 0; far != before && far >= 0 && s < sink; s += FAR) pass_over(at, full, empty);
        before = far;
      }
      continue;
    }
    const int own_far = far_of(rule, own), near = near_of(rule, own, document_of(rule, own));
    const Queries queries(rule, own);
    for (; tile > own; --tile) pass_over(at, full, empty);

    // The tile's own keys: each query sees itself there, so that the running maximum is finite from here on.
    float o[D / 2], s[32];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = 0.f;
    barrier_wait(full + 8 * at.stage, at.phase);
    hold(q);
    wgmma_fence();
    product_of<64>(s, q, stages + at.stage * 2 * TILE);
    wgmma_commit();
    wgmma_wait<0>();
    hold(s);
    mask(s, queries.sees(rule, own), queries.has_sinks(rule, own), NEVER);
    float highest0 = NEVER, highest1 = NEVER, total0 = 0.f, total1 = 0.f;
    raise(s, highest0, highest1);
    weigh(s, scale_log2, highest0, highest1, total0, total1);
    pack_all(p, s);
    Turn<STAGES> before = at;
    at.next();
#pragma unroll 1
    for (--tile; tile >= near; --tile) {
      barrier_wait(full + 8 * at.stage, at.phase);
      hold(o);
      hold(p);
      wgmma_fence();
      product_of<64>(s, q, stages + at.stage * 2 * TILE);
      wgmma_commit();
      add_product<64>(o, p, stages + before.stage * 2 * TILE + TILE);
      wgmma_commit();
      wgmma_wait<1>();
      hold(s);
      if (queries.is_masked(rule, tile)) mask(s, queries.sees(rule, tile), queries.has_sinks(rule, tile), NEVER);
      float new0 = highest0, new1 = highest1;
      raise(s, new0, new1);
      const float shrink0 = exp2_fast((highest0 - new0) * scale_log2), shrink1 = exp2_fast((highest1 - new1) * scale_log2);
      highest0 = new0, highest1 = new1;
      total0 *= shrink0, total1 *= shrink1;
      weigh(s, scale_log2, highest0, highest1, total0, total1);
      wgmma_wait<0>();
      hold(o);
      hold(p);
      if (lane == 0) barrier_arrive(empty + 8 * before.stage);
      pack_all(p, s);
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        o[4 * j] *= shrink0, o[4 * j + 1] *= shrink0;
        o[4 * j + 2] *= shrink1, o[4 * j + 3] *= shrink1;
      }
      before = at;
      at.next();
    }
    hold(o);
    hold(p);
    wgmma_fence();
    add_product<64>(o, p, stages + before.stage * 2 * TILE + TILE);
    wgmma_commit();
    wgmma_wait<0>();
    hold(o);
    hold(p);
    if (lane == 0) barrier_arrive(empty + 8 * before.stage);
    for (; tile >= earliest; --tile) pass_over(at, full, empty);
    for (int each = first, of_before = -1; each < end; ++each) {
      const int far = far_of(rule, each);
      const bool is_new = far != of_before && far >= 0, is_own = is_new && far == own_far;
      for (int sinks = 0; is_new && !is_own && sinks < sink; sinks += FAR) pass_over(at, full, empty);
#pragma unroll 1
      for (int sinks = 0; is_own && sinks < sink; sinks += FAR) {
        float f[8];
        u32 few[4];
        const u32 keys = stages + at.stage * 2 * TILE;
        barrier_wait(full + 8 * at.stage, at.phase);
        hold(q);
        wgmma_fence();
        product_of<16>(f, q, keys);
        wgmma_commit();
        wgmma_wait<0>();
        hold(f);
        mask(f, queries.sees_far(rule, far, near, sinks), false, NEVER);
        float new0 = highest0, new1 = highest1;
        raise(f, new0, new1);
        const float shrink0 = exp2_fast((highest0 - new0) * scale_log2), shrink1 = exp2_fast((highest1 - new1) * scale_log2);
        highest0 = new0, highest1 = new1;
        total0 *= shrink0, total1 *= shrink1;
        weigh(f, scale_log2, highest0, highest1, total0, total1);
        pack_all(few, f);
#pragma unroll
        for (int j = 0; j < D / 8; ++j) {
          o[4 * j] *= shrink0, o[4 * j + 1] *= shrink0;
          o[4 * j + 2] *= shrink1, o[4 * j + 3] *= shrink1;
        }
        hold(o);
        hold(few);
        wgmma_fence();
        add_product<FAR>(o, few, keys + TILE);
        wgmma_commit();
        wgmma_wait<0>();
        hold(o);
        hold(few);
        if (lane == 0) barrier_arrive(empty + 8 * at.stage);
        at.next();
      }
      of_before = far;
    }
    total0 += __shfl_xor_sync(~0u, total0, 1);
    total1 += __shfl_xor_sync(~0u, total1, 1);
    total0 += __shfl_xor_sync(~0u, total0, 2);
    total1 += __shfl_xor_sync(~0u, total1, 2);
    if (queries.column == 0) {
      float* to = lse + (long)both * seq_len;
      const int query = queries.query;
      if (query < seq_len) to[query] = (highest0 * scale_log2 + log2_fast(total0)) * LN_2;
      if (query + 8 < seq_len) to[query + 8] = (highest1 * scale_log2 + log2_fast(total1)) * LN_2;
    }
    const bool copies = (threadIdx.x & 127) == 0;
    if (copies) bulk_wait_read<0>();
    named_sync(wg, 128);
    put_rows(o, 1.f / total0, 1.f / total1, own_out);
    fence_async_proxy();
    named_sync(wg, 128);
    if (copies) {
      store_tile(&out_map, own_out, head, own * 64, b);
      bulk_commit();
    }
  }
  if ((threadIdx.x & 127) == 0) bulk_wait_read<0>();
}

namespace of_queries {
constexpr int GROUPS = QUERY_GROUPS, STAGES = WIDTH > 64 ? 3 : 6;
// Queries, gradients of outputs and outputs of each warp group; then what it stores, which has room for its far weights.
constexpr int OWN = 3 * TILE, KV_AT = GROUPS * OWN, OUT_AT = KV_AT + STAGES * 2 * TILE, BAR_AT = OUT_AT + GROUPS * TILE;
}  // namespace of_queries

// Grid: any; an item is GROUPS tiles of queries of a head. far [B, H, tiles, 2, sink, D] (2: keys, values) is written where
// a tile has far keys; lse2, delta [B, H, 64 * tiles];
// ends [B, T]: where each token's document ends.
extern "C" __global__ void __launch_bounds__(128 * QUERY_GROUPS + 128, 1) hopper_window_grad_query(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap do_map, const __grid_constant__ TensorMap out_map,
    const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map,
    const __grid_constant__ TensorMap far_k_map, const __grid_constant__ TensorMap far_v_map,
    const __grid_constant__ TensorMap dq_map, const float* __restrict__ lse, float* __restrict__ lse2,
    float* __restrict__ delta, float* __restrict__ far_to, const int* __restrict__ starts, int* __restrict__ ends, int batch,
    int heads, int members, int seq_len, int window, int sink, float scale) {
  using namespace of_queries;
  extern __shared__ __align__(1024) char shared[];
  const u32 base = smem_address(shared), stages = base + KV_AT;
  const u32 q_full = base + BAR_AT, q_empty = q_full + 8, full = q_full + 16, empty = full + 8 * STAGES;
  const int wg = threadIdx.x >> 7, lane = threadIdx.x & 31;
  const int tiles = (seq_len + 63) / 64, blocks = (tiles + GROUPS - 1) / GROUPS, items = blocks * batch * heads;
  if (threadIdx.x == 0) {
    prefetch_map(&q_map);
    prefetch_map(&do_map);
    prefetch_map(&out_map);
    prefetch_map(&k_map);
    prefetch_map(&v_map);
    barrier_init(q_full, 1);
    barrier_init(q_empty, 4 * GROUPS);
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * GROUPS);
    }
    fence_barrier_init();
  }
  __syncthreads();

  Turn<STAGES> at;
  if (wg == 0) {
    fewer_registers<FEW<GROUPS>>();
    if (threadIdx.x == 0) {
      for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x, ++n) {
        const int both = item / blocks, b = both / heads, head = both % heads, key_head = head / members;
        const Rule rule{starts + (long)b * seq_len, seq_len, tiles, window, sink};
        const int first = item % blocks * GROUPS, end = min(first + GROUPS, tiles);
        barrier_wait(q_empty, (n & 1) ^ 1);
        barrier_expect(q_full, GROUPS * OWN);
        for (int u = 0; u < GROUPS; ++u) {
          const u32 to = base + u * OWN;
          load_tile(to, &q_map, q_full, head, (first + u) * 64, b);
          load_tile(to + TILE, &do_map, q_full, head, (first + u) * 64, b);
          load_tile(to + 2 * TILE, &out_map, q_full, head, (first + u) * 64, b);
        }
        for (int tile = first, before = -1; tile < end; ++tile) {
          const int far = far_of(rule, tile);
          for (int s = 0; far != before && far >= 0 && s < sink; s += FAR)
            load_keys(at, stages, full, empty, &far_k_map, &far_v_map, FAR_PART, key_head, far + s, b);
          before = far;
        }
        for (int tile = near_of(rule, first, document_of(rule, first)); tile < end; ++tile)
          load_keys(at, stages, full, empty, &k_map, &v_map, PART, key_head, tile * 64, b);
      }
    } else if (DOCUMENTS && threadIdx.x >= 32) {  // beside the copies: where each token's document ends, for the next pass
      for (int i = blockIdx.x * 96 + threadIdx.x - 32; i < batch * seq_len; i += gridDim.x * 96) {
        const int b = i / seq_len, token = i % seq_len;
        int end = seq_len;
        for (int from = token + 1; from < end;) {  // the first later token whose document begins after this one
          const int middle = (from + end) / 2;
          if (starts[b * seq_len + middle] > token) end = middle;
          else from = middle + 1;
        }
        ends[i] = end;
      }
    }
    return;
  }

  more_registers<REGISTERS<GROUPS>>();
  const u32 own_tiles = base + (wg - 1) * OWN, own_out = base + OUT_AT + (wg - 1) * TILE;
  const float scale_log2 = scale * LOG2_E;
  const bool copies = (threadIdx.x & 127) == 0;
  for (int item = blockIdx.x, n = 0; item < items; item += gridDim.x, ++n) {
    const int both = item / blocks, b = both / heads, head = both % heads;
    const Rule rule{starts + (long)b * seq_len, seq_len, tiles, window, sink};
    const int first = item % blocks * GROUPS, end = min(first + GROUPS, tiles), own = first + wg - 1;
    int tile = near_of(rule, first, document_of(rule, first));
    barrier_wait(q_full, n & 1);
    if (own >= tiles) {  // nothing to do here
      if (lane == 0) barrier_arrive(q_empty);
      for (int each = first, before = -1; each < end; ++each) {
        const int far = far_of(rule, each);
        for (int s = 0; far != before && far >= 0 && s < sink; s += FAR) pass_over(at, full, empty);
        before = far;
      }
      for (; tile < end; ++tile) pass_over(at, full, empty);
      continue;
    }
    const int own_far = far_of(rule, own), near = near_of(rule, own, document_of(rule, own));
    const Queries queries(rule, own);
    float delta0 = 0.f, delta1 = 0.f, lse0 = __int_as_float(0x7f800000), lse1 = lse0;
    u32 q[D / 4], g[D / 4];
    {
      load_rows(g, own_tiles + TILE);
      load_rows(q, own_tiles + 2 * TILE);  // outputs, which are not kept
#pragma unroll
      for (int i = 0; i < D / 4; i += 2) {
        delta0 += low_of(q[i]) * low_of(g[i]) + high_of(q[i]) * high_of(g[i]);
        delta1 += low_of(q[i + 1]) * low_of(g[i + 1]) + high_of(q[i + 1]) * high_of(g[i + 1]);
      }
#pragma unroll
      for (int i = 1; i < 3; ++i) {
        delta0 += __shfl_xor_sync(~0u, delta0, i);
        delta1 += __shfl_xor_sync(~0u, delta1, i);
      }
      load_rows(q, own_tiles);
      // No weight of a query outside of the sequence is more than zero.
      const float* from = lse + (long)both * seq_len;
      if (queries.query < seq_len) lse0 = from[queries.query] * LOG2_E;
      if (queries.query + 8 < seq_len) lse1 = from[queries.query + 8] * LOG2_E;
      if (queries.column == 0) {
        const long to = (long)both * tiles * 64 + queries.query;
        lse2[to] = lse0, lse2[to + 8] = lse1;
        delta[to] = delta0, delta[to + 8] = delta1;
      }
    }
    float dq[D / 2];
    int add = 0;
    if (copies) bulk_wait_read<0>();  // before what is stored below
    for (int each = first, of_before = -1; each < end; ++each) {
      const int far = far_of(rule, each);
      const bool is_new = far != of_before && far >= 0, is_own = is_new && far == own_far;
      for (int sinks = 0; is_new && !is_own && sinks < sink; sinks += FAR) pass_over(at, full, empty);
#pragma unroll 1
      for (int sinks = 0; is_own && sinks < sink; sinks += FAR) {
        float f[8], df[8];
        u32 p[4], ds[4];
        const u32 keys = stages + at.stage * 2 * TILE;
        barrier_wait(full + 8 * at.stage, at.phase);
        hold(q);
        hold(g);
        wgmma_fence();
        product_of<16>(f, q, keys);
        product_of<16>(df, g, keys + TILE);
        wgmma_commit();
        wgmma_wait<0>();
        hold(f);
        hold(df);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            f[4 * j + e] = exp2_fast(f[4 * j + e] * scale_log2 - lse0);
            f[4 * j + 2 + e] = exp2_fast(f[4 * j + 2 + e] * scale_log2 - lse1);
          }
        mask(f, queries.sees_far(rule, far, near, sinks), false, 0.f);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            df[4 * j + e] = f[4 * j + e] * (df[4 * j + e] - delta0);
            df[4 * j + 2 + e] = f[4 * j + 2 + e] * (df[4 * j + 2 + e] - delta1);
          }
        pack_all(p, f);
        pack_all(ds, df);
        hold(dq);
        hold(ds);
        wgmma_fence();
        add_product<FAR>(dq, ds, keys, add);
        add = 1;
        wgmma_commit();
        // Weights and gradients of scores with queries along the rows of shared memory.
        const int matrix = lane >> 3, to_row = (matrix >> 1) * 8 + (lane & 7), chunk = (threadIdx.x >> 5 & 3) * 2 + (matrix & 1);
        const u32 to = own_out + to_row * 128 + ((chunk ^ (to_row & 7)) << 4);
        named_sync(wg, 128);  // their matmuls of the sinks before are done
        store_matrices_transposed(to, p[0], p[1], p[2], p[3]);
        store_matrices_transposed(to + FAR_PART, ds[0], ds[1], ds[2], ds[3]);
        fence_async_proxy();
        named_sync(wg, 128);
        const long here = ((long)both * tiles + own) * 2 * sink;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
          float dk[8], dv[8];
          wgmma_fence();
          product_transposed(dk, own_tiles + part * PART, own_out + FAR_PART);
          product_transposed(dv, own_tiles + TILE + part * PART, own_out);
          wgmma_commit();
          wgmma_wait<0>();
          hold(dk);
          hold(dv);
          const int d = part * 64 + (threadIdx.x >> 5 & 3) * 16 + (lane >> 2);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int index = sinks + (i >> 2) * 8 + queries.column + (i & 1), element = d + ((i >> 1) & 1) * 8;
            if (index < sink && element < D) {
              far_to[(here + index) * D + element] = dk[i] * scale;
              far_to[(here + sink + index) * D + element] = dv[i];
            }
          }
        }
        hold(dq);
        hold(ds);
        if (lane == 0) barrier_arrive(empty + 8 * at.stage);
        at.next();
      }
      of_before = far;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(q_empty);
    for (; tile < near; ++tile) pass_over(at, full, empty);
    u32 ds[16];
    int before = -1;  // the stage whose matmul goes on
#pragma unroll 1
    for (; tile <= own; ++tile) {
      float s[32], dp[32];
      const u32 keys = stages + at.stage * 2 * TILE;
      barrier_wait(full + 8 * at.stage, at.phase);
      hold(q);
      hold(g);
      wgmma_fence();
      product_of<64>(s, q, keys);
      wgmma_commit();
      wgmma_wait<0>();
      hold(s);
      hold(dq);
      hold(ds);
      if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
      before = at.stage;
      wgmma_fence();
      product_of<64>(dp, g, keys + TILE);
      wgmma_commit();
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          s[4 * j + e] = exp2_fast(s[4 * j + e] * scale_log2 - lse0);
          s[4 * j + 2 + e] = exp2_fast(s[4 * j + 2 + e] * scale_log2 - lse1);
        }
      if (queries.is_masked(rule, tile)) mask(s, queries.sees(rule, tile), queries.has_sinks(rule, tile), 0.f);
      wgmma_wait<0>();
      hold(dp);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        ds[2 * j] = pack(s[4 * j] * (dp[4 * j] - delta0), s[4 * j + 1] * (dp[4 * j + 1] - delta0));
        ds[2 * j + 1] = pack(s[4 * j + 2] * (dp[4 * j + 2] - delta1), s[4 * j + 3] * (dp[4 * j + 3] - delta1));
      }
      hold(dq);
      hold(ds);
      wgmma_fence();
      add_product<64>(dq, ds, keys, add);
      add = 1;
      wgmma_commit();
      if (D == 128) {  // there are no registers to let it go on
        wgmma_wait<0>();
        hold(dq);
        hold(ds);
      }
      at.next();
    }
    wgmma_wait<0>();
    hold(dq);
    hold(ds);
    if (lane == 0) barrier_arrive(empty + 8 * before);
    for (; tile < end; ++tile) pass_over(at, full, empty);
    named_sync(wg, 128);  // the last matmuls of far weights are done
    put_rows(dq, scale, scale, own_out);
    fence_async_proxy();
    named_sync(wg, 128);
    if (copies) {
      store_tile(&dq_map, own_out, head, own * 64, b);
      bulk_commit();
    }
  }
  if (copies) bulk_wait_read<0>();
}

namespace of_keys {
constexpr int GROUPS = KEY_GROUPS, STAGES = WIDTH > 64 ? 3 : 5, BUFFERS = 2, SUMS = 512;
constexpr int OWN = 2 * TILE, Q_AT = BUFFERS * GROUPS * OWN, SUMS_AT = Q_AT + STAGES * 2 * TILE, BAR_AT = SUMS_AT + STAGES * SUMS;
}  // namespace of_keys

// Grid: any; an item is GROUPS tiles of keys of a key head. `sums` [B, key heads, tiles, 2, sink, D]: what far queries add
// to the first keys of a tile's last document.
extern "C" __global__ void __launch_bounds__(128 * KEY_GROUPS + 128, 1) hopper_window_grad_key(
    const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap do_map, const __grid_constant__ TensorMap k_map,
    const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dk_map, const __grid_constant__ TensorMap dv_map,
    const float* __restrict__ lse2, const float* __restrict__ delta, const float* __restrict__ sums,
    const int* __restrict__ starts, const int* __restrict__ ends, int batch, int key_heads, int members, int seq_len,
    int window, int sink, float scale) {
  using namespace of_keys;
  extern __shared__ __align__(1024) char shared[];
  const u32 base = smem_address(shared);
  const u32 own_full = base + BAR_AT, own_empty = own_full + 8 * BUFFERS, full = own_empty + 8 * BUFFERS, empty = full + 8 * STAGES;
  const int wg = threadIdx.x >> 7, warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int tiles = (seq_len + 63) / 64, blocks = (tiles + GROUPS - 1) / GROUPS, items = blocks * batch * key_heads;
  if (threadIdx.x == 0) {
    prefetch_map(&q_map);
    prefetch_map(&do_map);
    prefetch_map(&k_map);
    prefetch_map(&v_map);
    for (int s = 0; s < BUFFERS; ++s) {
      barrier_init(own_full + 8 * s, 1);
      barrier_init(own_empty + 8 * s, GROUPS);
    }
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, 4 * GROUPS);
    }
    fence_barrier_init();
  }
  __syncthreads();

  Turn<STAGES> at;
  Turn<BUFFERS> buffer;
  // The last tile of queries to which a tile of keys is near.
  const auto last_of = [=](int tile, int b) {
    const int last = min((tile * 64 + 62 + window) / 64, tiles - 1);
    return DOCUMENTS ? min(last, (ends[(long)b * seq_len + min(tile * 64 + 63, seq_len - 1)] - 1) / 64) : last;
  };
  if (wg == 0) {
    fewer_registers<FEW<GROUPS>>();
    if (threadIdx.x == 0) {
      for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int both = item / blocks, b = both / key_heads, key_head = both % key_heads;
        const int first = item % blocks * GROUPS, last = last_of(min(first + GROUPS, tiles) - 1, b);
        const u32 bar = own_full + 8 * buffer.stage;
        barrier_wait(own_empty + 8 * buffer.stage, buffer.phase ^ 1);
        barrier_expect(bar, GROUPS * OWN);
        for (int u = 0; u < GROUPS; ++u) {
          const u32 to = base + (buffer.stage * GROUPS + u) * OWN;
          load_tile(to, &k_map, bar, key_head, (first + u) * 64, b);
          load_tile(to + TILE, &v_map, bar, key_head, (first + u) * 64, b);
        }
        buffer.next();
        for (int head = key_head * members; head < (key_head + 1) * members; ++head)
          for (int tile = first; tile <= last; ++tile) {
            const u32 bar = full + 8 * at.stage, to = base + Q_AT + at.stage * 2 * TILE, sums_to = base + SUMS_AT + at.stage * SUMS;
            const long from = ((long)(b * key_heads * members + head) * tiles + tile) * 64;
            barrier_wait(empty + 8 * at.stage, at.phase ^ 1);
            barrier_expect(bar, 2 * TILE + SUMS);
            load_tile(to, &q_map, bar, head, tile * 64, b);
            bulk_load(sums_to, lse2 + from, 256, bar);
            load_tile(to + TILE, &do_map, bar, head, tile * 64, b);
            bulk_load(sums_to + 256, delta + from, 256, bar);
            at.next();
          }
      }
    }
    return;
  }

  more_registers<REGISTERS<GROUPS>>();
  const bool copies = (threadIdx.x & 127) == 0;
  const int row = (warp & 3) * 16 + (lane >> 2), column = (lane & 3) * 2;
  const float scale_log2 = scale * LOG2_E;
  int stored = -1;  // the buffer whose results are being copied
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int both = item / blocks, b = both / key_heads, key_head = both % key_heads;
    const int first = item % blocks * GROUPS, last = last_of(min(first + GROUPS, tiles) - 1, b), own = first + wg - 1;
    const u32 k = base + (buffer.stage * GROUPS + wg - 1) * OWN, v = k + TILE;
    barrier_wait(own_full + 8 * buffer.stage, buffer.phase);
    if (own >= tiles) {  // nothing to do here
      if (copies && stored >= 0) {
        bulk_wait_read<0>();
        barrier_arrive(own_empty + 8 * stored);
      }
      if (copies) barrier_arrive(own_empty + 8 * buffer.stage);
      stored = -1;
      buffer.next();
      for (int tile = members * (last - first + 1); tile > 0; --tile) pass_over(at, full, empty);
      continue;
    }
    const int own_last = last_of(own, b), key = own * 64 + row;
    // Queries see a key from its own place on, up to its window's or, if it is a sink, to its document's end.
    int end0 = seq_len, end1 = seq_len, start0 = 0, start1 = 0, newest = 0, oldest = own * 64 + window;
    if (DOCUMENTS) {
      const int* of_starts = starts + (long)b * seq_len;
      const int* of_ends = ends + (long)b * seq_len;
      start0 = of_starts[min(key, seq_len - 1)], end0 = of_ends[min(key, seq_len - 1)];
      start1 = of_starts[min(key + 8, seq_len - 1)], end1 = of_ends[min(key + 8, seq_len - 1)];
      newest = of_starts[min(own * 64 + 63, seq_len - 1)];
      oldest = min(oldest, of_ends[own * 64]);
    }
    if (key - start0 >= sink) end0 = min(end0, key + window);
    if (key + 8 - start1 >= sink) end1 = min(end1, key + 8 + window);
    float dk[D / 2], dv[D / 2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) dk[i] = 0.f, dv[i] = 0.f;
    for (int member = 0; member < members; ++member) {
      int tile = first;
      for (; tile < own; ++tile) pass_over(at, full, empty);
      u32 p[16], ds[16];
      int before = -1;  // the stage whose matmul goes on
#pragma unroll 1
      for (; tile <= own_last; ++tile) {
        const u32 q = base + Q_AT + at.stage * 2 * TILE, grad_out = q + TILE, sums_at = base + SUMS_AT + at.stage * SUMS + column * 4;
        float s[32], dp[32];
        barrier_wait(full + 8 * at.stage, at.phase);
        wgmma_fence();
        product(s, k, q);
        wgmma_commit();
        wgmma_wait<0>();
        hold(s);
        hold(dk);
        hold(ds);
        if (before >= 0 && lane == 0) barrier_arrive(empty + 8 * before);
        before = at.stage;
        wgmma_fence();
        product(dp, v, grad_out);
        wgmma_commit();
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 l = load_shared2(sums_at + j * 32);
          s[4 * j] = exp2_fast(s[4 * j] * scale_log2 - l.x);
          s[4 * j + 1] = exp2_fast(s[4 * j + 1] * scale_log2 - l.y);
          s[4 * j + 2] = exp2_fast(s[4 * j + 2] * scale_log2 - l.x);
          s[4 * j + 3] = exp2_fast(s[4 * j + 3] * scale_log2 - l.y);
        }
        if (tile == own || tile * 64 + 63 >= oldest) {
          const int from = key - tile * 64 - column, to0 = end0 - tile * 64 - column, to1 = end1 - tile * 64 - column;
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              if (8 * j + e < from || 8 * j + e >= to0) s[4 * j + e] = 0.f;
              if (8 * j + e < from + 8 || 8 * j + e >= to1) s[4 * j + 2 + e] = 0.f;
            }
        }
        pack_all(p, s);
        hold(p);
        hold(dv);
        wgmma_fence();
        add_product<64>(dv, p, grad_out);
        wgmma_commit();
        wgmma_wait<1>();
        hold(dp);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 l = load_shared2(sums_at + 256 + j * 32);
          ds[2 * j] = pack(low_of(p[2 * j]) * (dp[4 * j] - l.x), high_of(p[2 * j]) * (dp[4 * j + 1] - l.y));
          ds[2 * j + 1] = pack(low_of(p[2 * j + 1]) * (dp[4 * j + 2] - l.x), high_of(p[2 * j + 1]) * (dp[4 * j + 3] - l.y));
        }
        hold(ds);
        hold(dk);
        wgmma_fence();
        add_product<64>(dk, ds, q);
        wgmma_commit();
        wgmma_wait<1>();
        hold(p);
        hold(dv);
        __syncwarp();
        at.next();
        if (copies && stored >= 0) {  // what was copied out meanwhile
          bulk_wait_read<0>();
          barrier_arrive(own_empty + 8 * stored);
        }
        stored = -1;
      }
      wgmma_wait<0>();
      hold(dk);
      hold(ds);
      if (lane == 0) barrier_arrive(empty + 8 * before);
      for (; tile <= last; ++tile) pass_over(at, full, empty);
    }
    float factor = scale;
    if (sink > 0 && newest + sink > own * 64 && own * 64 + 64 < seq_len) {
      const float* from = sums + ((long)both * tiles + own) * 2 * sink * D;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int index = key + half * 8 - newest;
        if (index >= 0 && index < sink)
#pragma unroll
          for (int i = 0; i < D / 4; ++i) {
            const int at_element = index * D + (i >> 1) * 8 + column + (i & 1), mine = (i >> 1) * 4 + half * 2 + (i & 1);
            dk[mine] = dk[mine] * scale + from[at_element];
            dv[mine] += from[sink * D + at_element];
          }
        else
#pragma unroll
          for (int i = 0; i < D / 4; ++i) dk[(i >> 1) * 4 + half * 2 + (i & 1)] *= scale;
      }
      factor = 1.f;
    }
    named_sync(wg, 128);  // all matmuls with these keys and values are done
    put_rows(dk, factor, factor, k);
    put_rows(dv, 1.f, 1.f, v);
    fence_async_proxy();
    named_sync(wg, 128);
    if (copies) {
      store_tile(&dk_map, k, key_head, own * 64, b);
      store_tile(&dv_map, v, key_head, own * 64, b);
      bulk_commit();
    }
    stored = buffer.stage;
    buffer.next();
  }
  if (copies) bulk_wait_read<0>();
}
