// Activations to E4M3 with one scale for each token, and z = s (A x^) for low-rank compensation.
//
// A block takes 8 tokens; the blocks of a cluster share out their features. A lane has 8 neighbouring
// features of token lane / 4 at a time, which is also what a tensor-core operand wants, in an order
// of features that A is read in too.
//
// Given by the compiler's command line: WARPS, HELD (pieces of 8 features that a lane keeps in
// registers between finding the scale and using it; 0: it reads them again), AHEAD (whether it holds
// A too, from before the kernel ahead has ended), BLOCKS (on a multiprocessor), RANK_STEPS (of 8),
// HALF (float16 activations), TILED (codes as multiply.cu wants them, else row by row), VECTORS (see
// `read`).
#include "activations.cuh"
#include "chunk.cuh"

struct Problem {
  const u16 *x;              // [M, K] bfloat16 or float16, rows x_stride apart
  const u16 *offset;         // [K] bfloat16, subtracted first, or null
  const u16 *inner_factor[5];   // A: [8, depth * 128] bfloat16, for each of RANK_STEPS
  const float *inner_scale[5];  // s: [8]
  u8 *codes;                 // [depth, M, 128] swizzled, or [M, code_stride]
  float *token_scale;        // [M]
  u16 *inner;                // z: [RANK_STEPS, M, 16] bfloat16, high parts and low parts
  u32 *flags;                // set to 0 for the product
  long long x_stride, code_stride;
  int tokens, columns, depth;  // M, K, ceil(K / 128)
  int flag_count;
};

constexpr int LANES = RANK_STEPS > 0 ? RANK_STEPS : 1;

// The bfloat16 values of two E4M3 bytes: exact.
DEVICE u32 codes_to_bfloat16(u32 codes) {
  u32 halves;
  asm("{\n.reg .b16 c;\ncvt.u16.u32 c, %1;\ncvt.rn.f16x2.e4m3x2 %0, c;\n}"
      : "=r"(halves)
      : "r"(codes));
  float first, second;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.f32.f16 %0, a;\ncvt.f32.f16 %1, b;\n}"
      : "=f"(first), "=f"(second)
      : "r"(halves));
  return bfloat16x2(first, second);
}

// sums[16 ranks, 8 tokens] += A[16, 16] x[16, 8]; only 8 ranks are used.
DEVICE void project(float (&sums)[4], u32 a0, u32 a2, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) quantize(
    const __grid_constant__ Problem p) {
  __shared__ float warp_largest[WARPS][8], block_largest[16][8];
  __shared__ float warp_inner[LANES][WARPS][64], block_inner[16][LANES][64];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int blocks = cluster_size(), rank = cluster_rank();
  int first_token = blockIdx.x / blocks * 8;
  int token = first_token + lane / 4;
  Activations x{p.x, p.offset, p.x_stride, p.tokens, p.columns};
  int slices = p.depth * 4;  // of 32 features
  int begin = slices * rank / blocks + warp, end = slices * (rank + 1) / blocks;
  int column = lane % 4 * 8;
  int factor_stride = p.depth * 128;
  launch_dependents();
  if (blocks > 1) cluster_arrive();  // that all have started: nobody writes to them before

  constexpr int KEPT = HELD > 0 ? HELD : 1;
  uint4 kept[KEPT], factor[KEPT];
  int of_lane = lane / 4 * factor_stride + column;
  if (AHEAD) {  // constants: before the kernel ahead has ended
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      if (begin + i * WARPS < end) factor[i] = __ldg((const uint4 *)(p.inner_factor[0] + of_lane + (begin + i * WARPS) * 32));
  }
  wait_for_inputs();
  if (blockIdx.x == gridDim.x - 1)
    for (int i = threadIdx.x; i < p.flag_count; i += WARPS * 32) p.flags[i] = 0;

  float most = 0;
  if (HELD > 0) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      int slice = begin + i * WARPS;
      kept[i] = slice < end ? read<VECTORS>(x, token, slice * 32 + column) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
      int slice = begin + i * WARPS;
      if (slice < end) most = values(x, kept[i], slice * 32 + column).largest(most);
    }
  } else {
#pragma unroll 4
    for (int slice = begin; slice < end; slice += WARPS)
      most = values(x, read<VECTORS>(x, token, slice * 32 + column), slice * 32 + column).largest(most);
  }
  most = larger(most, __shfl_xor_sync(~0u, most, 1));
  most = larger(most, __shfl_xor_sync(~0u, most, 2));
  if (lane % 4 == 0) warp_largest[warp][lane / 4] = most;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) most = larger(most, warp_largest[w][lane / 4]);
  if (blocks > 1) {
    cluster_wait();
    if (warp == 0 && lane % 4 == 0)
      for (int b = 0; b < blocks; ++b)
        store_at(address_at(shared_address(&block_largest[rank][lane / 4]), b), most);
    cluster_sync();
    for (int b = 0; b < blocks; ++b) most = larger(most, block_largest[b][lane / 4]);
  }
  Scale scale(most);
  bool there = token < p.tokens;
  if (there && rank == 0 && warp == 0 && lane % 4 == 0) p.token_scale[token] = scale.value;

  float sums[LANES][4];
#pragma unroll
  for (int r = 0; r < LANES; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = 0;
  if (!there) scale = Scale(448);  // nobody's token takes the slow way
  auto finish = [&](uint4 raw, uint4 kept_factor, int slice) {
    int k = slice * 32 + column;
    uint2 out = values(x, raw, k).codes(scale, k, p.columns);
    if (there) {
      int inside = k % CHUNK_COLUMNS, m = token;
      if (TILED) {
        u64 row = (u64)(k / CHUNK_COLUMNS) * p.tokens + m;
        *(uint2 *)(p.codes + row * CHUNK_COLUMNS + ((inside / 16 ^ (m & 7)) * 16 + inside % 16)) = out;
      } else if (k < p.code_stride) {  // a multiple of 16
        *(uint2 *)(p.codes + m * p.code_stride + k) = out;
      }
    }
    if (RANK_STEPS > 0) {
      u32 b[4] = {codes_to_bfloat16(out.x), codes_to_bfloat16(out.x >> 16),
                  codes_to_bfloat16(out.y), codes_to_bfloat16(out.y >> 16)};
#pragma unroll
      for (int r = 0; r < RANK_STEPS; ++r) {
        uint4 a = AHEAD
                      ? kept_factor
                      : __ldg((const uint4 *)(p.inner_factor[r] + of_lane + slice * 32));
        project(sums[r], a.x, a.y, b[0], b[1]);
        project(sums[r], a.z, a.w, b[2], b[3]);
      }
    }
  };
  if (HELD > 0) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      if (begin + i * WARPS < end) finish(kept[i], factor[i], begin + i * WARPS);
  } else {
#pragma unroll 2
    for (int slice = begin; slice < end; slice += WARPS)
      finish(read<VECTORS>(x, token, slice * 32 + column), make_uint4(0, 0, 0, 0), slice);
  }

  if (RANK_STEPS > 0) {
#pragma unroll
    for (int r = 0; r < RANK_STEPS; ++r) {
      // Rank lane / 4, tokens lane % 4 * 2 and the next.
      warp_inner[r][warp][lane * 2] = sums[r][0];
      warp_inner[r][warp][lane * 2 + 1] = sums[r][1];
    }
    __syncthreads();
    for (int e = threadIdx.x; e < RANK_STEPS * 64; e += WARPS * 32) {
      float sum = 0;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sum += warp_inner[e / 64][w][e % 64];
      store_at(address_at(shared_address(&block_inner[rank][e / 64][e % 64]), 0), sum);
    }
    if (blocks > 1)
      cluster_sync();
    else
      __syncthreads();
    for (int e = threadIdx.x; rank == 0 && e < RANK_STEPS * 64; e += WARPS * 32) {
      int step = e / 64, r = e % 64 / 8, m = first_token + e % 8;
      if (m >= p.tokens) continue;
      float sum = 0;
      for (int b = 0; b < blocks; ++b) sum += block_inner[b][step][e % 64];
      // The scale of this element's token, which other lanes have.
      float token_most = 0;
      if (blocks > 1)
        for (int b = 0; b < blocks; ++b) token_most = larger(token_most, block_largest[b][e % 8]);
      else
        for (int w = 0; w < WARPS; ++w) token_most = larger(token_most, warp_largest[w][e % 8]);
      float token_scale = __fdiv_rn(larger(token_most, 0x1p-100f), 448.0f);
      float z = sum * token_scale * p.inner_scale[step][r];
      u32 high = bfloat16x2(z, 0) & 0xFFFF;
      u32 low = bfloat16x2(z - __uint_as_float(high << 16), 0) & 0xFFFF;
      u16 *to = p.inner + ((u64)step * p.tokens + m) * 16;
      int swap = m >> 2 & 1;
      to[(0 ^ swap) * 8 + r] = high;
      to[(1 ^ swap) * 8 + r] = low;
    }
  }
}
