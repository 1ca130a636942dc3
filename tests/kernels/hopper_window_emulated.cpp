// hopper_window.cu's kernels on a CPU, each as a function of its grid, a seed of the order of threads, and its arguments.
#define EMULATED
#include "hopper_emulated.h"
#include "hopper_window.cu"

extern "C" int run_window_forward(int blocks, int seed, TensorMap* q, TensorMap* k, TensorMap* v, TensorMap* far_k, TensorMap* far_v,
                           TensorMap* out, float* lse, const int* starts, int batch, int heads, int members, int seq_len,
                           int window, int sink, float scale_log2) {
  return launch(blocks, 1, 128 * FORWARD_GROUPS + 128, [=] {
    hopper_window_forward(*q, *k, *v, *far_k, *far_v, *out, lse, starts, batch, heads, members, seq_len, window, sink, scale_log2);
  }, seed);
}
extern "C" int run_window_grad_query(int blocks, int seed, TensorMap* q, TensorMap* grad_out, TensorMap* out, TensorMap* k, TensorMap* v,
                              TensorMap* far_k, TensorMap* far_v, TensorMap* dq, const float* lse, float* lse2, float* delta,
                              float* far, const int* starts, int* ends, int batch, int heads, int members, int seq_len, int window,
                              int sink, float scale) {
  return launch(blocks, 1, 128 * QUERY_GROUPS + 128, [=] {
    hopper_window_grad_query(*q, *grad_out, *out, *k, *v, *far_k, *far_v, *dq, lse, lse2, delta, far, starts, ends, batch, heads, members, seq_len, window, sink, scale);
  }, seed);
}
extern "C" int run_window_grad_key(int blocks, int seed, TensorMap* q, TensorMap* grad_out, TensorMap* k, TensorMap* v, TensorMap* dk,
                            TensorMap* dv, const float* lse2, const float* delta, const float* sums, const int* starts,
                            const int* ends, int batch, int key_heads, int members, int seq_len, int window, int sink, float scale) {
  return launch(blocks, 1, 128 * KEY_GROUPS + 128, [=] {
    hopper_window_grad_key(*q, *grad_out, *k, *v, *dk, *dv, lse2, delta, sums, starts, ends, batch, key_heads, members, seq_len, window, sink, scale);
  }, seed);
}
