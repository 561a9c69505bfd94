// Activations to E4M3 with one scale for each token, and z = s (A x^) for low-rank compensation.
//
// A block has TOKENS tokens, all features of them to find the scales; PARTS blocks share out what
// comes after, the codes and z. So nothing has to meet but the warps of a block: the product adds up
// the parts of z.
//
// Given by the compiler's command line: TOKENS, PARTS, WARPS, HELD (pieces of 8 features of a token
// that a thread keeps), STEPS (of 8 ranks, of all matrices together), AHEAD (slices of A that a warp
// keeps, read before the kernel ahead has ended; 0: none), BLOCKS (on a multiprocessor), HALF, ORDER
// (of the codes: 0 row by row, 1 as multiply.cu wants them, 2 as decode.cu), VECTORS (see `read`).
#include "activations.cuh"
#include "chunk.cuh"

constexpr int MOST_STEPS = 5;  // quantize.py's STEPS
constexpr int THREADS = WARPS * 32;
constexpr int SLICE = 32;  // features that a tensor core takes in two operations
constexpr int FACTORS = STEPS > 0 ? STEPS : 1, KEPT = AHEAD > 0 ? AHEAD : 1;
constexpr int ROW_TILES = (STEPS + 1) / 2;  // of 16 ranks

struct Problem {
  const u16 *x;                          // [M, K] bfloat16 or float16, rows x_stride apart
  const u16 *offset;                     // [K] bfloat16, subtracted first, or null
  const u16 *inner_factor[MOST_STEPS];   // A: [8, depth * 128] bfloat16
  const float *inner_scale[MOST_STEPS];  // s: [8]
  u8 *codes;  // [M, code_stride]; [depth, M, 128] swizzled; [units, code_stride], see decode.cu
  float *token_scale;                    // [M]
  u16 *inner;  // z: [PARTS, STEPS, M, 16] bfloat16, high parts and low parts
  u32 *flags;  // set to 0 for the product
  long long x_stride, code_stride;
  int tokens, columns, depth;  // M, K, ceil(K / 128)
  int flag_count;
};

// Two values to bfloat16, the first in the low half.
DEVICE u32 bfloat16x2(float first, float second) {
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
  return out;
}

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

// sums[16 ranks, 8 tokens] += A[16, 16] x[16, 8].
DEVICE void project(float (&sums)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

DEVICE float largest_of_warp(float v) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) v = larger(v, __shfl_xor_sync(~0u, v, apart));
  return v;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) quantize(
    const __grid_constant__ Problem p) {
  extern __shared__ __align__(16) u8 memory[];
  __shared__ float warp_largest[TOKENS][WARPS], scales[TOKENS];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int part = blockIdx.x % PARTS, first_token = blockIdx.x / PARTS * TOKENS;
  Activations x{p.x, p.offset, p.x_stride, p.tokens, p.columns};
  int slices = p.depth * (CHUNK_COLUMNS / SLICE);
  int begin = slices * part / PARTS, end = slices * (part + 1) / PARTS;  // of this block
  launch_dependents();

  // A lane has 8 neighbouring features of rank lane / 4, as of token lane / 4 later.
  int of_lane = lane / 4 * p.depth * CHUNK_COLUMNS + lane % 4 * 8;
  auto factor_at = [&](int step, int slice) {
    return __ldg((const uint4 *)(p.inner_factor[step] + of_lane + slice * SLICE));
  };
  // The scale of the element of z that this thread will add up first.
  float first_scale = 0;
  if (STEPS > 0 && threadIdx.x < STEPS * 8 * TOKENS) {
    int rank = threadIdx.x / TOKENS;
    first_scale = __ldg(p.inner_scale[rank / 8] + rank % 8);
  }
  uint4 kept[KEPT][FACTORS];
  if (AHEAD > 0) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
#pragma unroll
      for (int step = 0; step < STEPS; ++step)
        kept[i][step] = factor_at(step, min(begin + warp + i * WARPS, end - 1));
  }
  wait_for_inputs();
  if (blockIdx.x == gridDim.x - 1)
    for (int i = threadIdx.x; i < p.flag_count; i += THREADS) p.flags[i] = 0;

  auto feature = [](int i) { return (int)(threadIdx.x + i * THREADS) * 8; };
  uint4 raw[TOKENS][HELD];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t)
#pragma unroll
    for (int i = 0; i < HELD; ++i) raw[t][i] = read<VECTORS>(x, first_token + t, feature(i));
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < HELD; ++i) most = values(x, raw[t][i], feature(i)).largest(most);
    most = largest_of_warp(most);
    if (lane == 0) warp_largest[t][warp] = most;
  }
  __syncthreads();
  float most_of_lane = 0;  // of token lane % TOKENS
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    float most = largest_of_warp(lane < WARPS ? warp_largest[t][lane] : 0);
    if (lane % TOKENS == t) most_of_lane = most;
  }
  Scale of_lane_token(most_of_lane);
  if (warp == 0 && lane < TOKENS) {
    scales[lane] = of_lane_token.value;
    if (part == 0 && first_token + lane < p.tokens)
      p.token_scale[first_token + lane] = of_lane_token.value;
  }

  int stride = ((slices + PARTS - 1) / PARTS) * SLICE + 16;  // so that few tokens meet in a bank
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    int m = first_token + t;
    Scale scale = of_lane_token.of_lane(t);
    if (m >= p.tokens) break;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      int k = feature(i);
      if (k < begin * SLICE || k >= end * SLICE) continue;
      uint2 codes = values(x, raw[t][i], k).codes(scale, k, p.columns);
      if (STEPS > 0) *(uint2 *)(memory + t * stride + k - begin * SLICE) = codes;
      if (ORDER == 2) {
        int row = m * 4 + k / CHUNK_COLUMNS % 4;
        int piece = k % CHUNK_COLUMNS / 16 ^ (row & 7);
        u64 line = k / (4 * CHUNK_COLUMNS) * p.code_stride + row * CHUNK_COLUMNS;
        *(uint2 *)(p.codes + line + piece * 16 + k % 16) = codes;
      } else if (ORDER == 1) {
        u64 row = (u64)(k / CHUNK_COLUMNS) * p.tokens + m;
        int piece = k % CHUNK_COLUMNS / 16 ^ (m & 7);
        *(uint2 *)(p.codes + row * CHUNK_COLUMNS + piece * 16 + k % 16) = codes;
      } else if (k < p.code_stride) {  // a multiple of 16
        *(uint2 *)(p.codes + m * p.code_stride + k) = codes;
      }
    }
  }
  if (STEPS == 0) return;

  __syncthreads();
  float sums[ROW_TILES > 0 ? ROW_TILES : 1][4];
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = 0;
  auto add = [&](int slice, const uint4(&factors)[FACTORS]) {
    uint2 codes = make_uint2(0, 0);
    if (lane / 4 < TOKENS)
      codes = *(uint2 *)(memory + lane / 4 * stride + (slice - begin) * SLICE + lane % 4 * 8);
    u32 b[4] = {codes_to_bfloat16(codes.x), codes_to_bfloat16(codes.x >> 16),
                codes_to_bfloat16(codes.y), codes_to_bfloat16(codes.y >> 16)};
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      uint4 upper = factors[r * 2], lower = make_uint4(0, 0, 0, 0);
      if (r * 2 + 1 < STEPS) lower = factors[r * 2 + 1];
      project(sums[r], upper.x, lower.x, upper.y, lower.y, b[0], b[1]);
      project(sums[r], upper.z, lower.z, upper.w, lower.w, b[2], b[3]);
    }
  };
  if (AHEAD > 0) {
#pragma unroll
    for (int i = 0; i < KEPT; ++i)
      if (begin + warp + i * WARPS < end) add(begin + warp + i * WARPS, kept[i]);
  } else {
#pragma unroll 2
    for (int slice = begin + warp; slice < end; slice += WARPS) {
      uint4 factors[FACTORS];
#pragma unroll
      for (int step = 0; step < STEPS; ++step) factors[step] = factor_at(step, slice);
      add(slice, factors);
    }
  }

  // Ranks lane / 4 and 8 further, tokens lane % 4 * 2 and the next.
  float *partial = (float *)(memory + TOKENS * stride);  // [WARPS, ROW_TILES * 16, TOKENS]
  constexpr int RANKS = ROW_TILES * 16;
#pragma unroll
  for (int r = 0; r < ROW_TILES; ++r)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      int rank = r * 16 + lane / 4 + e / 2 * 8, t = lane % 4 * 2 + e % 2;
      if (t < TOKENS) partial[(warp * RANKS + rank) * TOKENS + t] = sums[r][e];
    }
  __syncthreads();
  for (int e = threadIdx.x; e < STEPS * 8 * TOKENS; e += THREADS) {
    int rank = e / TOKENS, t = e % TOKENS, m = first_token + t;
    if (m >= p.tokens) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += partial[(w * RANKS + rank) * TOKENS + t];
    float scale = e == threadIdx.x ? first_scale : p.inner_scale[rank / 8][rank % 8];
    float z = sum * scales[t] * scale;
    u32 high = bfloat16x2(z, 0) & 0xFFFF;
    u32 low = bfloat16x2(z - __uint_as_float(high << 16), 0) & 0xFFFF;
    u16 *to = p.inner + ((u64)(part * STEPS + rank / 8) * p.tokens + m) * 16;
    int swap = m >> 2 & 1;
    to[(0 ^ swap) * 8 + rank % 8] = high;
    to[(1 ^ swap) * 8 + rank % 8] = low;
  }
}
