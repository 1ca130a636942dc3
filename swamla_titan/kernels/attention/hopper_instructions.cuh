// Hopper's own instructions as functions: mbarrier, bulk copies, wgmma, named barriers. No header is included, so that
// NVRTC compiles it too.
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct __align__(64) TensorMap {
  u64 opaque[16];
};

__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}" ::"r"(bar), "r"(parity) : "memory");
}
// Barriers that are initialised are visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tma_load(u32 to, const TensorMap* map, u32 bar, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];"
      ::"r"(to), "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, u32 from, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];"
               ::"l"(map), "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory");
}
__device__ __forceinline__ void bulk_load(u32 to, const void* from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, u32 from, u32 bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Of all three warp groups, 128 threads each, together no more than the block has at its start: 384 * 168 = 64512
// (24 + 2 * 240, or 40 + 2 * 232); asking for more waits forever.
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

__device__ __forceinline__ void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving uses of accumulators across the instructions that start and await matmuls.
template <int N> __device__ __forceinline__ void hold(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> __device__ __forceinline__ void hold(u32 (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(d[i])::"memory");
}

// Shared-memory matrices are tiles of 64 columns (128 bytes), rows of 128 bytes, swizzled by 128 bytes, at multiples of
// 1024 bytes. An operand's descriptor, without its upper half, which is the same for all. The operand is contracted along
// columns (`by_columns`), or along rows (`by_rows`: `next` is the distance of the next 64 columns).
__device__ __forceinline__ u32 by_columns(u32 at) { return (at & 0x3FFFF) >> 4 | 1 << 16; }
__device__ __forceinline__ u32 by_rows(u32 at, u32 next) {
  return (at & 0x3FFFF) >> 4 | (next >> 4) << 16;
}
#define UPPER "0x40000040"  // 8 rows are 1024 bytes; swizzled by 128

#define IO4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define IO16(d, i) IO4(d, i), IO4(d, i + 4), IO4(d, i + 8), IO4(d, i + 12)
#define IO32(d, i) IO16(d, i), IO16(d, i + 16)
#define L0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define L1 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define L2 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define MMA "wgmma.mma_async.sync.aligned.m64"
#define KIND "k16.f32.bf16.bf16 {"
#define NEW4(d, i) "=f"(d[i]), "=f"(d[i + 1]), "=f"(d[i + 2]), "=f"(d[i + 3])
#define NEW16(d, i) NEW4(d, i), NEW4(d, i + 4), NEW4(d, i + 8), NEW4(d, i + 12)
#define NEW32(d, i) NEW16(d, i), NEW16(d, i + 16)
// Descriptors are put together next to each instruction, because the compiler would keep those of a whole loop in
// registers. A_ADD, B_ADD: what their addresses are further on, in bytes / 16.
#define DESC_A(lo, add) ".reg .b64 da; .reg .b32 la; add.u32 la, " lo ", " add "; mov.b64 da, {la, " UPPER "};\n"
#define DESC_B(lo, add, upper) ".reg .b64 db; .reg .b32 lb; add.u32 lb, " lo ", " add "; mov.b64 db, {lb, " upper "};\n"
#define IF(x) ".reg .pred p; setp.ne.b32 p, " x ", 0;\n"

// d = a b^T, both contracted along columns; what d was before does not have to be kept in registers for it.
template <int A_ADD, int B_ADD> __device__ __forceinline__ void mma_new(float (&d)[32], u32 a, u32 b) {
  asm volatile("{" IF("0") DESC_A("%32", "%34") DESC_B("%33", "%35", UPPER) MMA "n64" KIND L0 "}, da, db, p, 1, 1, 0, 0;}"
               : NEW32(d, 0) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
}
template <int A_ADD, int B_ADD> __device__ __forceinline__ void mma_new(float (&d)[64], u32 a, u32 b) {
  asm volatile("{" IF("0") DESC_A("%64", "%66") DESC_B("%65", "%67", UPPER) MMA "n128" KIND L0 "," L1 "}, da, db, p, 1, 1, 0, 0;}"
               : NEW32(d, 0), NEW32(d, 32) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
}
// d += a b^T, both contracted along columns.
template <int A_ADD, int B_ADD> __device__ __forceinline__ void mma(float (&d)[32], u32 a, u32 b) {
  asm volatile("{" IF("1") DESC_A("%32", "%34") DESC_B("%33", "%35", UPPER) MMA "n64" KIND L0 "}, da, db, p, 1, 1, 0, 0;}"
               : IO32(d, 0) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
}
template <int A_ADD, int B_ADD> __device__ __forceinline__ void mma(float (&d)[64], u32 a, u32 b) {
  asm volatile("{" IF("1") DESC_A("%64", "%66") DESC_B("%65", "%67", UPPER) MMA "n128" KIND L0 "," L1 "}, da, db, p, 1, 1, 0, 0;}"
               : IO32(d, 0), IO32(d, 32) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
}
// d += a b, b contracted along rows.
template <int A_ADD, int B_ADD> __device__ __forceinline__ void mma_rows(float (&d)[96], u32 a, u32 b) {
  asm volatile("{" IF("1") DESC_A("%96", "%98") DESC_B("%97", "%99", UPPER) MMA "n192" KIND L0 "," L1 "," L2 "}, da, db, p, 1, 1, 0, 1;}"
               : IO32(d, 0), IO32(d, 32), IO32(d, 64) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
}
template <int A_ADD, int B_ADD> __device__ __forceinline__ void mma_rows(float (&d)[64], u32 a, u32 b) {
  asm volatile("{" IF("1") DESC_A("%64", "%66") DESC_B("%65", "%67", UPPER) MMA "n128" KIND L0 "," L1 "}, da, db, p, 1, 1, 0, 1;}"
               : IO32(d, 0), IO32(d, 32) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
}
// The same with a in registers; d = a b if not `add`.
template <int B_ADD> __device__ __forceinline__ void mma_rows(float (&d)[64], const u32* a, u32 b, int add) {
  asm volatile("{" IF("%69") DESC_B("%68", "%70", UPPER) MMA "n128" KIND L0 "," L1 "}, {%64,%65,%66,%67}, db, p, 1, 1, 1;}"
               : IO32(d, 0), IO32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(B_ADD));
}
template <int B_ADD> __device__ __forceinline__ void mma_rows(float (&d)[96], const u32* a, u32 b, int add) {
  asm volatile("{" IF("%101") DESC_B("%100", "%102", UPPER) MMA "n192" KIND L0 "," L1 "," L2 "}, {%96,%97,%98,%99}, db, p, 1, 1, 1;}"
               : IO32(d, 0), IO32(d, 32), IO32(d, 64) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add), "n"(B_ADD));
}

// d += a b, or d = a b if not `add`, N columns: b contracted along rows, a in registers.
#define A4(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define L8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define L48 L0 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
template <int N, int B_ADD> __device__ __forceinline__ void add_rows(float* d, const u32* a, u32 b, int add) {
  if constexpr (N == 64)
    asm volatile("{" IF("%38") DESC_B("%36", "%37", UPPER) MMA "n64" KIND L0 "}, {%32,%33,%34,%35}, db, p, 1, 1, 1;}"
                 : IO32(d, 0) : A4(a), "r"(b), "n"(B_ADD), "r"(add));
  if constexpr (N == 96)
    asm volatile("{" IF("%54") DESC_B("%52", "%53", UPPER) MMA "n96" KIND L48 "}, {%48,%49,%50,%51}, db, p, 1, 1, 1;}"
                 : IO32(d, 0), IO16(d, 32) : A4(a), "r"(b), "n"(B_ADD), "r"(add));
  if constexpr (N == 128)
    asm volatile("{" IF("%70") DESC_B("%68", "%69", UPPER) MMA "n128" KIND L0 "," L1 "}, {%64,%65,%66,%67}, db, p, 1, 1, 1;}"
                 : IO32(d, 0), IO32(d, 32) : A4(a), "r"(b), "n"(B_ADD), "r"(add));
}
// d = a b^T, or d += a b^T if ADD, a in registers, b contracted along columns; N columns.
template <int N, int ADD, int B_ADD> __device__ __forceinline__ void mma_columns(float* d, const u32* a, u32 b) {
  if constexpr (N == 64 && ADD)
    asm volatile("{" IF("1") DESC_B("%36", "%37", UPPER) MMA "n64" KIND L0 "}, {%32,%33,%34,%35}, db, p, 1, 1, 0;}"
                 : IO32(d, 0) : A4(a), "r"(b), "n"(B_ADD));
  if constexpr (N == 64 && !ADD)
    asm volatile("{" IF("0") DESC_B("%36", "%37", UPPER) MMA "n64" KIND L0 "}, {%32,%33,%34,%35}, db, p, 1, 1, 0;}"
                 : NEW32(d, 0) : A4(a), "r"(b), "n"(B_ADD));
  if constexpr (N == 16 && ADD)
    asm volatile("{" IF("1") DESC_B("%12", "%13", UPPER) MMA "n16" KIND L8 "}, {%8,%9,%10,%11}, db, p, 1, 1, 0;}"
                 : IO4(d, 0), IO4(d, 4) : A4(a), "r"(b), "n"(B_ADD));
  if constexpr (N == 16 && !ADD)
    asm volatile("{" IF("0") DESC_B("%12", "%13", UPPER) MMA "n16" KIND L8 "}, {%8,%9,%10,%11}, db, p, 1, 1, 0;}"
                 : NEW4(d, 0), NEW4(d, 4) : A4(a), "r"(b), "n"(B_ADD));
}
// d = a^T b^T or d += a^T b^T, 16 columns: a contracted along rows, b along columns.
template <int ADD, int A_ADD, int B_ADD> __device__ __forceinline__ void mma_transposed(float (&d)[8], u32 a, u32 b) {
  if constexpr (ADD)
    asm volatile("{" IF("1") DESC_A("%8", "%10") DESC_B("%9", "%11", UPPER) MMA "n16" KIND L8 "}, da, db, p, 1, 1, 1, 0;}"
                 : IO4(d, 0), IO4(d, 4) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
  else
    asm volatile("{" IF("0") DESC_A("%8", "%10") DESC_B("%9", "%11", UPPER) MMA "n16" KIND L8 "}, da, db, p, 1, 1, 1, 0;}"
                 : NEW4(d, 0), NEW4(d, 4) : "r"(a), "r"(b), "n"(A_ADD), "n"(B_ADD));
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float low_of(u32 r) { return __uint_as_float(r << 16); }
__device__ __forceinline__ float high_of(u32 r) { return __uint_as_float(r & 0xFFFF0000u); }
__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float log2_fast(float x) {
  float r;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ void store_matrices(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void store_matrices_transposed(u32 at, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
__device__ __forceinline__ void load_matrices(u32* r, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at) : "memory");
}
__device__ __forceinline__ uint4 load_shared(u32 at) {
  uint4 r;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(at) : "memory");
  return r;
}
__device__ __forceinline__ float2 load_shared2(u32 at) {
  float2 r;
  asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(r.x), "=f"(r.y) : "r"(at) : "memory");
  return r;
}

