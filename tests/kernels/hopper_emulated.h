// A CPU's stand-in for hopper_instructions.cuh: each thread of a block is a fiber, switched in random order; copies and matmuls
// happen as late as the barriers and waits let them (`late`), so that a buffer that is reused too early gives wrong
// results; a deadlock is reported with what each thread waits for. Not modelled: proxies, memory order, speed.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <deque>
#include <random>
#include <vector>

typedef uint32_t u32;
typedef uint64_t u64;
typedef uint16_t u16;
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __shared__
#define __align__(x)

struct TensorMap { u64 opaque[16]; };  // base, sizes D H T B, strides in bytes H T B, rows of a box
struct float2 { float x, y; };
struct uint4 { u32 x, y, z, w; };
struct Index { int x, y, z; };

constexpr u32 SHARED_FROM = 1024, SHARED_BYTES = 232448;
alignas(1024) char shared[SHARED_BYTES];

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  Index thread;
  bool done = false;
  char waits[80] = "";
  // What the warp's other threads read: shuffles.
  float shuffled;
  struct Op { float* d; const u32* a_regs; u64 a, b; int n, add, b_rows, a_rows; };
  std::vector<Op> ops;         // not run yet
  std::vector<size_t> groups;  // ends of committed groups in ops
  long bulk_reads = 0;
};
std::vector<Fiber> fibers;
Fiber* current;
ucontext_t scheduler;
Index blockIdx, gridDim;
#define threadIdx (current->thread)
std::mt19937 chance(1);
long progress;

inline void yield() { swapcontext(&current->context, &scheduler); }
template <class F> inline void wait_for(F condition, const char* what, u32 x = 0, u32 y = 0) {
  snprintf(current->waits, sizeof current->waits, "%s %u %u", what, x, y);
  while (!condition()) yield();
  current->waits[0] = 0;
  ++progress;
}
// All of `count` threads, by a key: returns the generation once all are there; `last` runs what they do together.
struct Meeting { int here = 0; long generation = 0; };
Meeting meetings[4096];
template <class F> inline void meet(int key, int count, F last, const char* what) {
  Meeting& m = meetings[key];
  const long mine = m.generation;
  if (++m.here == count) {
    m.here = 0;
    last();
    ++m.generation;
    ++progress;
    return;
  }
  wait_for([&] { return m.generation != mine; }, what, key, count);
}
inline int warp_index() { return threadIdx.x >> 5; }
inline void __syncthreads() { meet(0, (int)fibers.size(), [] {}, "syncthreads"); }
inline void __syncwarp() { meet(100 + warp_index(), 32, [] {}, "syncwarp"); }
inline float __shfl_xor_sync(u32 mask, float x, int by) {
  const int lanes = __builtin_popcount(mask), key = lanes == 32 ? 200 + warp_index() : 300 + (threadIdx.x >> 4);
  current->shuffled = x;
  meet(key, lanes, [] {}, "shuffle");
  const float r = fibers[threadIdx.x ^ by].shuffled;
  meet(key + 200, lanes, [] {}, "shuffle");
  return r;
}
inline void named_sync(int id, int threads) { meet(1000 + id, threads, [] {}, "bar.sync"); }
inline void named_arrive(int id, int threads) {
  Meeting& m = meetings[1000 + id];
  if (++m.here == threads) m.here = 0, ++m.generation;
  ++progress;
}
template <class T> inline T min(T a, T b) { return a < b ? a : b; }
template <class T> inline T max(T a, T b) { return a > b ? a : b; }
inline int atomicAdd(int* p, int x) { int r = *p; *p += x; return r; }
inline float __int_as_float(int x) { float r; memcpy(&r, &x, 4); return r; }
inline float __uint_as_float(u32 x) { float r; memcpy(&r, &x, 4); return r; }
inline long __cvta_generic_to_shared(const void* p) { return (const char*)p - shared + SHARED_FROM; }
inline u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
inline char* at(u32 address) {
  if (address < SHARED_FROM || address >= SHARED_FROM + SHARED_BYTES) { printf("address %u\n", address); abort(); }
  return shared + (address - SHARED_FROM);
}
inline u32 swizzled(u32 address) { return address ^ (((address >> 7) & 7) << 4); }

struct Barrier { u32 count = 0; long pending = 0, bytes = 0, phase = 0; };
Barrier barriers[SHARED_BYTES / 8];
inline Barrier& barrier_at(u32 bar) { return barriers[(bar - SHARED_FROM) / 8]; }
inline void turn(Barrier& b) { if (b.pending == 0 && b.bytes == 0) ++b.phase, b.pending = b.count; ++progress; }
inline void barrier_init(u32 bar, u32 count) { barrier_at(bar) = {count, (long)count, 0, 0}; }
inline void barrier_expect(u32 bar, u32 bytes) { Barrier& b = barrier_at(bar); b.bytes += bytes; --b.pending; turn(b); }
inline void barrier_arrive(u32 bar) {
  Barrier& b = barrier_at(bar);
  if (--b.pending < 0) { printf("barrier %u: too many arrivals\n", bar); abort(); }
  turn(b);
}
inline void barrier_wait(u32 bar, u32 parity) {
  wait_for([=] { return (barrier_at(bar).phase & 1) != (long)parity; }, "mbarrier", bar - SHARED_FROM, parity);
}
inline void fence_barrier_init() {}
inline void fence_async_proxy() {}
inline void prefetch_map(const TensorMap*) {}
template <int N> inline void more_registers() {}
template <int N> inline void fewer_registers() {}

std::deque<std::function<void()>> copies;  // in flight; each ends at a random time
inline void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
  const TensorMap m = *map;
  copies.push_back([=] {
    const char* base = (const char*)m.opaque[0];
    const long rows = m.opaque[8];
    if (to % 1024) { printf("copy to %u\n", to); abort(); }
    for (long r = 0; r < rows; ++r)
      for (int c = 0; c < 64; ++c) {
        const bool inside = c0 + c < (long)m.opaque[1] && c1 < (long)m.opaque[2] && c2 + r < (long)m.opaque[3] && c3 < (long)m.opaque[4];
        u16 x = 0;
        if (inside) memcpy(&x, base + (c0 + c) * 2 + c1 * (long)m.opaque[5] + (c2 + r) * (long)m.opaque[6] + c3 * (long)m.opaque[7], 2);
        memcpy(at(swizzled(to + r * 128 + c * 2)), &x, 2);
      }
    Barrier& b = barrier_at(bar);
    b.bytes -= rows * 128;
    turn(b);
  });
}
inline void tma_store(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3) {
  const TensorMap m = *map;
  Fiber* f = current;
  ++f->bulk_reads;
  copies.push_back([=] {
    if (from % 1024) { printf("copy from %u\n", from); abort(); }
    for (long r = 0; r < (long)m.opaque[8]; ++r)
      for (int c = 0; c < 64; ++c) {
        const bool inside = c0 + c < (long)m.opaque[1] && c1 < (long)m.opaque[2] && c2 + r < (long)m.opaque[3] && c3 < (long)m.opaque[4];
        if (inside) memcpy((char*)m.opaque[0] + (c0 + c) * 2 + c1 * (long)m.opaque[5] + (c2 + r) * (long)m.opaque[6] + c3 * (long)m.opaque[7], at(swizzled(from + r * 128 + c * 2)), 2);
      }
    --f->bulk_reads;
    ++progress;
  });
}
inline void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
  copies.push_back([=] {
    memcpy(at(to), from, bytes);
    Barrier& b = barrier_at(bar);
    b.bytes -= bytes;
    turn(b);
  });
}
inline void bulk_store(void* to, u32 from, u32 bytes) {
  Fiber* f = current;
  ++f->bulk_reads;
  copies.push_back([=] { memcpy(to, at(from), bytes); --f->bulk_reads; ++progress; });
}
inline void bulk_commit() {}
template <int N> inline void bulk_wait_read() { Fiber* f = current; wait_for([=] { return f->bulk_reads <= N; }, "bulk"); }

inline float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }
inline u16 to_bf16(float x) {
  u32 r;
  memcpy(&r, &x, 4);
  if (x != x) return 0x7fc0;
  return (u16)((r + 0x7fff + ((r >> 16) & 1)) >> 16);
}
inline float element(u64 desc, int row, int k, int by_rows) {
  const u32 start = (desc & 0x3FFF) << 4, leading = ((desc >> 16) & 0x3FFF) << 4, stride = ((desc >> 32) & 0x3FFF) << 4;
  const u32 offset = by_rows ? row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2 : row / 8 * stride + row % 8 * 128 + k * 2;
  u16 x;
  memcpy(&x, at(swizzled(start + offset)), 2);
  return from_bf16(x);
}
inline void wgmma_fence() {}
inline void wgmma_commit() { current->groups.push_back(current->ops.size()); }
// Threads 128 wg ... : run op `i` of each.
inline void run_op(int wg, size_t i) {
  Fiber* f = &fibers[wg * 128];
  const Fiber::Op op = f[0].ops[i];
  std::vector<float> a(64 * 16), b(op.n * 16), d(64 * op.n);
  for (int r = 0; r < 64; ++r)
    for (int k = 0; k < 16; ++k) {
      if (op.a_regs) {
        const Fiber& owner = f[r / 16 * 32 + r % 8 * 4 + k % 8 / 2];
        const u32 reg = owner.ops[i].a_regs[(r % 16 / 8) + k / 8 * 2];
        a[r * 16 + k] = from_bf16(k & 1 ? reg >> 16 : reg & 0xFFFF);
      } else {
        a[r * 16 + k] = element(op.a, r, k, op.a_rows);
      }
    }
  for (int n = 0; n < op.n; ++n)
    for (int k = 0; k < 16; ++k) b[n * 16 + k] = element(op.b, n, k, op.b_rows);
  for (int t = 0; t < 128; ++t) {
    const Fiber::Op& own = f[t].ops[i];
    for (int j = 0; j < op.n / 2; ++j) {
      const int r = t / 32 * 16 + t % 32 / 4 + (j & 2) * 4, n = j / 4 * 8 + t % 4 * 2 + (j & 1);
      float sum = own.add ? own.d[j] : 0.f;
      for (int k = 0; k < 16; ++k) sum += a[r * 16 + k] * b[n * 16 + k];
      own.d[j] = sum;
    }
  }
}
template <int N> inline void wgmma_wait() {
  const int wg = threadIdx.x >> 7;
  meet(2000 + wg, 128, [=] {
    Fiber* f = &fibers[wg * 128];
    for (int t = 1; t < 128; ++t)
      if (f[t].ops.size() != f[0].ops.size() || f[t].groups != f[0].groups) { printf("threads of a warp group differ\n"); abort(); }
    if (f[0].groups.size() > N) {
      const size_t ended = f[0].groups.size() - N, count = f[0].groups[ended - 1];
      for (size_t i = 0; i < count; ++i) run_op(wg, i);
      for (int t = 0; t < 128; ++t) {
        f[t].ops.erase(f[t].ops.begin(), f[t].ops.begin() + count);
        f[t].groups.erase(f[t].groups.begin(), f[t].groups.begin() + ended);
        for (size_t& g : f[t].groups) g -= count;
      }
    }
  }, "wgmma.wait");
}
template <int N> inline void hold(float (&)[N]) {}
template <int N> inline void hold(u32 (&)[N]) {}
inline u32 by_columns(u32 a) { return (a & 0x3FFFF) >> 4 | 1 << 16; }
inline u32 by_rows(u32 a, u32 next) { return (a & 0x3FFFF) >> 4 | (next >> 4) << 16; }
constexpr u64 UPPER = (u64)0x40000040 << 32;
template <int A_ADD, int B_ADD, int N> inline void mma_new(float (&d)[N], u32 a, u32 b) { current->ops.push_back({d, nullptr, a + A_ADD | UPPER, b + B_ADD | UPPER, N * 2, 0, 0}); }
template <int A_ADD, int B_ADD, int N> inline void mma(float (&d)[N], u32 a, u32 b) { current->ops.push_back({d, nullptr, a + A_ADD | UPPER, b + B_ADD | UPPER, N * 2, 1, 0}); }
template <int A_ADD, int B_ADD, int N> inline void mma_rows(float (&d)[N], u32 a, u32 b) { current->ops.push_back({d, nullptr, a + A_ADD | UPPER, b + B_ADD | UPPER, N * 2, 1, 1}); }
template <int B_ADD, int N> inline void mma_rows(float (&d)[N], const u32* a, u32 b, int add) { current->ops.push_back({d, a, 0, b + B_ADD | UPPER, N * 2, add, 1}); }
template <int N, int B_ADD> inline void add_rows(float* d, const u32* a, u32 b, int add) { current->ops.push_back({d, a, 0, b + B_ADD | UPPER, N, add, 1}); }
template <int N, int ADD, int B_ADD> inline void mma_columns(float* d, const u32* a, u32 b) { current->ops.push_back({d, a, 0, b + B_ADD | UPPER, N, ADD, 0}); }
template <int ADD, int A_ADD, int B_ADD> inline void mma_transposed(float (&d)[8], u32 a, u32 b) { current->ops.push_back({d, nullptr, a + A_ADD | UPPER, b + B_ADD | UPPER, 16, ADD, 0, 1}); }
inline u32 pack(float low, float high) { return (u32)to_bf16(low) | (u32)to_bf16(high) << 16; }
inline float low_of(u32 r) { return from_bf16(r & 0xFFFF); }
inline float high_of(u32 r) { return from_bf16(r >> 16); }
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
// stmatrix: lane 8 m + r has the address of row r of matrix m.
struct Stored { u32 address, reg[4]; };
Stored stored[4096];
inline void stmatrix(u32 address, u32 a, u32 b, u32 c, u32 d, bool transposed) {
  stored[threadIdx.x] = {address, {a, b, c, d}};
  meet(2100 + warp_index(), 32, [=] {
    const Stored* s = stored + warp_index() * 32;
    for (int m = 0; m < 4; ++m)
      for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) {
          const int row = transposed ? c : r, column = transposed ? r : c;  // in the registers
          const u32 reg = s[row * 4 + column / 2].reg[m];
          const u16 x = column & 1 ? reg >> 16 : reg & 0xFFFF;
          memcpy(at(s[m * 8 + r].address + c * 2), &x, 2);
        }
  }, "stmatrix");
}
inline void store_matrices(u32 to, u32 a, u32 b, u32 c, u32 d) { stmatrix(to, a, b, c, d, false); }
inline void store_matrices_transposed(u32 to, u32 a, u32 b, u32 c, u32 d) { stmatrix(to, a, b, c, d, true); }
inline void load_matrices(u32* to, u32 address) {
  stored[threadIdx.x].address = address;
  meet(2200 + warp_index(), 32, [] {}, "ldmatrix");
  const Stored* s = stored + warp_index() * 32;
  const int lane = threadIdx.x & 31;
  for (int m = 0; m < 4; ++m) memcpy(to + m, at(s[m * 8 + lane / 4].address + lane % 4 * 4), 4);
  meet(2300 + warp_index(), 32, [] {}, "ldmatrix");
}
inline uint4 load_shared(u32 a) { uint4 r; memcpy(&r, at(a), 16); return r; }
inline float2 load_shared2(u32 a) { float2 r; memcpy(&r, at(a), 8); return r; }

std::function<void()> body;
inline void enter() {
  body();
  current->done = true;
  ++progress;
  while (true) yield();
}
// Runs a grid; 0, or 1 at a deadlock.
inline int launch(int x, int y, int threads, std::function<void()> kernel, int seed) {
  chance.seed(seed);
  body = kernel;
  gridDim = {x, y, 1};
  for (int by = 0; by < y; ++by)
    for (int bx = 0; bx < x; ++bx) {
      blockIdx = {bx, by, 0};
      memset(shared, 0xFF, sizeof shared);  // NaN
      for (Meeting& m : meetings) m = {};
      copies.clear();
      fibers.clear();
      fibers.resize(threads);
      for (int t = 0; t < threads; ++t) {
        Fiber& f = fibers[t];
        f.thread = {t, 0, 0};
        f.stack.resize(1 << 16);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        makecontext(&f.context, enter, 0);
      }
      std::vector<int> order(threads);
      for (int t = 0; t < threads; ++t) order[t] = t;
      for (int idle = 0;;) {
        const long before = progress;
        // Warp groups in random order, so that one may run ahead of the other.
        const int first = chance() % threads;
        bool all = true;
        for (int i = 0; i < threads; ++i) {
          Fiber& f = fibers[(first + i) % threads];
          if (f.done) continue;
          all = false;
          current = &f;
          swapcontext(&scheduler, &f.context);
        }
        if (!copies.empty() && (progress == before || chance() % 4 == 0)) {
          const size_t i = chance() % copies.size();
          auto copy = copies[i];
          copies.erase(copies.begin() + i);
          copy();
          ++progress;
        }
        if (all) break;
        idle = progress == before ? idle + 1 : 0;
        if (idle > 3) {
          printf("deadlock in block %d %d\n", bx, by);
          char last[80] = "-";
          for (Fiber& f : fibers)
            if (!f.done && strcmp(f.waits, last)) { printf("  thread %d: %s\n", f.thread.x, f.waits); strcpy(last, f.waits); }
          return 1;
        }
      }
      while (!copies.empty()) { copies.front()(); copies.pop_front(); }
    }
  return 0;
}
