// hopper.cu's kernels on a CPU, each as a function of its grid, a seed of the order of threads, and its arguments.
#define EMULATED
#include "hopper_emulated.h"
#include "hopper.cu"

extern "C" int run_forward(int blocks, int seed, TensorMap* q, TensorMap* q_last, TensorMap* k, TensorMap* k_last, TensorMap* v, u16* out, float* lse,
                           const int* starts, int* counter, int own_last, int batch, int heads, int seq_len, float scale_log2, int group) {
  return launch(blocks, 1, 384, [=] { hopper_forward(*q, *q_last, *k, *k_last, *v, out, lse, starts, counter, own_last, batch, heads, seq_len, scale_log2, group); }, seed);
}
extern "C" int run_row_sums(int blocks, int seed, const u16* out, const u16* grad_out, const float* lse, float* lse2,
                            float* delta, int batch, int heads, int seq_len, int padded) {
  return launch(blocks, 1, 256, [=] { hopper_row_sums(out, grad_out, lse, lse2, delta, batch, heads, seq_len, padded); }, seed);
}
extern "C" int run_backward_keys(int blocks, int seed, TensorMap* q, TensorMap* q_last, TensorMap* grad_out, TensorMap* k, TensorMap* k_last, TensorMap* v,
                                 const float* lse2, const float* delta, const int* ends, u16* dk, u16* dk_last, u16* dv, int dk_width, int dk_last_width, int dv_width, char* workspace,
                                 int own_last, int first_head, int here, int group, int heads, int seq_len, int padded, float scale, float scale_log2) {
  return launch(blocks, 1, 384, [=] {
    hopper_backward_keys(*q, *q_last, *grad_out, *k, *k_last, *v, lse2, delta, ends, dk, dk_last, dv, dk_width, dk_last_width, dv_width, workspace, own_last, first_head, here, group, heads, seq_len, padded, scale, scale_log2);
  }, seed);
}
extern "C" int run_backward_queries(int blocks, int seed, TensorMap* k, TensorMap* k_last, const int* starts, const char* workspace, u16* dq,
                                    int own_last, int first_head, int here, int group, int heads, int seq_len, float scale) {
  return launch(blocks, 1, 384, [=] { hopper_backward_queries(*k, *k_last, starts, workspace, dq, own_last, first_head, here, group, heads, seq_len, scale); }, seed);
}
