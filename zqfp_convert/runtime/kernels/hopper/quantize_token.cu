// Few activations to E4M3: a block for each token, so that nothing has to meet but its warps.
//
// Given by the compiler's command line: WARPS, HELD (pieces of 8 features of a thread), HALF, TILED,
// VECTORS, as in quantize.cu.
#include "activations.cuh"
#include "chunk.cuh"

struct Problem {
  const u16 *x;              // [M, K] bfloat16 or float16, rows x_stride apart
  const u16 *offset;         // [K] bfloat16, subtracted first, or null
  u8 *codes;                 // [depth, M, 128] swizzled, or [M, code_stride]
  float *token_scale;        // [M]
  u32 *flags;                // set to 0 for the product
  long long x_stride, code_stride;
  int tokens, columns, depth;  // M, K, ceil(K / 128)
  int flag_count;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) quantize_token(
    const __grid_constant__ Problem p) {
  __shared__ float warp_largest[WARPS];
  int token = blockIdx.x;
  Activations x{p.x, p.offset, p.x_stride, p.tokens, p.columns};
  launch_dependents();
  wait_for_inputs();
  if (token == p.tokens - 1)
    for (int i = threadIdx.x; i < p.flag_count; i += WARPS * 32) p.flags[i] = 0;

  auto feature = [](int i) { return (threadIdx.x + i * WARPS * 32) * 8; };
  uint4 raw[HELD];
#pragma unroll
  for (int i = 0; i < HELD; ++i) raw[i] = read<VECTORS>(x, token, feature(i));
  float most = 0;
#pragma unroll
  for (int i = 0; i < HELD; ++i) most = values(x, raw[i], feature(i)).largest(most);
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) most = larger(most, __shfl_xor_sync(~0u, most, apart));
  if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) most = larger(most, warp_largest[w]);
  Scale scale(most);
  if (threadIdx.x == 0) p.token_scale[token] = scale.value;
#pragma unroll
  for (int i = 0; i < HELD; ++i) {
    int k = feature(i);
    if (k >= p.depth * CHUNK_COLUMNS) break;
    uint2 codes = values(x, raw[i], k).codes(scale, k, p.columns);
    if (TILED) {
      u64 row = (u64)(k / CHUNK_COLUMNS) * p.tokens + token;
      int piece = k % CHUNK_COLUMNS / 16 ^ (token & 7);
      *(uint2 *)(p.codes + row * CHUNK_COLUMNS + piece * 16 + k % 16) = codes;
    } else if (k < p.code_stride) {  // a multiple of 16
      *(uint2 *)(p.codes + token * p.code_stride + k) = codes;
    }
  }
}
