// INLINE: the multiplying warps make the activations E4M3 themselves, in shared memory, while the
// first weights are on their way. With few tokens that costs nothing; a kernel for it would.
#pragma once
#include "activations.cuh"
#include "work.cuh"

constexpr int INLINE_TOKENS = INLINE ? 8 : 1;
__shared__ float input_scale[INLINE_TOKENS];
__shared__ float input_largest[INLINE ? CONSUMERS / 32 : 1][INLINE_TOKENS];

// Writes the chunks from `begin` to `end` of all tokens.
DEVICE void quantize_inputs(const Problem &p, const Shared &s, int begin, int end) {
  constexpr int AT_ONCE = 4;  // loads on their way
  Activations x{p.x, p.offset, p.x_stride, p.tokens, p.columns};
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int pieces = p.columns / 8;
  for (int m = 0; m < p.tokens; ++m) {
    float most = 0;
    for (int first = threadIdx.x; first < pieces; first += AT_ONCE * CONSUMERS) {
      uint4 raw[AT_ONCE];
      int k[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {  // none waits for another: the last one is read again
        k[i] = min(first + i * CONSUMERS, pieces - 1) * 8;
        raw[i] = read<true>(x, m, k[i]);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) most = values(x, raw[i], k[i]).largest(most);
    }
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2)
      most = larger(most, __shfl_xor_sync(~0u, most, apart));
    if (lane == 0) input_largest[warp][m] = most;
  }
  sync_threads(INPUTS_MEET, CONSUMERS);
  for (int m = 0; m < p.tokens; ++m) {
    float most = 0;
#pragma unroll
    for (int w = 0; w < CONSUMERS / 32; ++w) most = larger(most, input_largest[w][m]);
    Scale scale(most);
    if (threadIdx.x == 0) input_scale[m] = scale.value;
    for (int piece = begin * 16 + threadIdx.x; piece < end * 16; piece += CONSUMERS) {
      int k = piece * 8;
      uint2 codes = values(x, read<true>(x, m, k), k).codes(scale, k, p.columns);
      u32 to = s.inputs + ((piece / 2 - begin * 8) * p.tokens + m) * 16 + piece % 2 * 8;
      asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(codes.x), "r"(codes.y)
                   : "memory");
    }
  }
  async_proxy_fence();
  sync_threads(INPUTS_MEET, CONSUMERS);
}
