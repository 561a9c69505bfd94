// y = W^ x^ + B z + bias for few tokens, as when a model decodes: what counts is to read the weights
// at full speed, and to be done soon after the activations are there.
//
// The work is cut into units, 16 output features by 4 chunks of 128 columns. A block has whole rows
// of units; its warpgroups share them out evenly, so that nothing has to meet but the warps of a
// block. Weights go from memory straight into registers, AHEAD units at a time, the first ones before
// the activations are there.
//
// A tensor-core operation takes 16 rows from each warp of a warpgroup and multiplies all with the
// same operand. Here the four warps have the same rows and a chunk of columns each; the operand has
// four columns for each token, one for each of the four chunks, and a warp's results are those in its
// own. So there is no need for more than 16 rows at a time, which few blocks of a small layer would
// have.
//
// Given by the compiler's command line: TOKENS (the operand's columns: 8, 16 or 32; M is a quarter at
// most), WARPGROUPS, AHEAD, GROUPS (scales in 128 columns: 1, 2 or 4), BOOKS (see codebook.cuh),
// INNER_PARTS (of z, to be added up), HALF (float16 results).
#include "weights.cuh"
#include "wgmma.cuh"

constexpr int ROWS = 16;  // of a unit
constexpr int SLICES = 4;  // chunks of a unit
constexpr int WARPS = WARPGROUPS * SLICES, THREADS = WARPS * 32;
constexpr int MATRICES = 4;  // at most
constexpr int WEIGHTS_BYTES = CHUNK_ROWS * CHUNK_COLUMNS / 2;
constexpr int CHUNK_BYTES = WEIGHTS_BYTES + CHUNK_ROWS * GROUPS;
constexpr int PIECE_BYTES = 32 * 16;                  // 16 rows of a chunk, in two of these
constexpr int CODES_BYTES = TOKENS * CHUNK_COLUMNS;  // of a unit
constexpr int OUTER_BYTES = 32 * 8;                  // 16 rows of B, 8 ranks in bfloat16

struct Matrix {
  const u8 *chunks;         // [ceil(N / 64), depth, CHUNK_BYTES]
  const u8 *outer;          // B: [ceil(N / 64), rank steps, 128 threads, 4] bfloat16
  const float *row_factor;  // [ceil(N / 64) * 64]
  const float *bias;        // the same, or null
  u16 *y;                   // [M, N]
  int rows;                 // N
  int first;                // its first, of tiles of 16 rows; they are counted on
  int rank_steps;           // ceil(r / 8)
  int rank_step;            // its first in z
};

struct Problem {
  const u8 *codes;           // [units, TOKENS, 128] E4M3, pieces swizzled: row 4 m + chunk % 4
  const float *token_scale;  // [M], and room for a multiple of 4
  const u8 *inner;           // z: [INNER_PARTS, rank steps, M, 16] bfloat16, 8 high and 8 low parts
  int tokens;                // M
  int depth, units;          // ceil(K / 128); of a tile, ceil(K / 512)
  int tiles;                 // of 16 rows, of all matrices
  int rank_steps;            // of all matrices
  int most_steps;            // of a matrix
  int most_tiles;            // of a block
  int parts;                 // tiles that a warpgroup has a part of, at most
  Books books;
  Matrix matrices[MATRICES];
};

// A tile of the block.
struct Tile {
  const u8 *weights;  // in the first chunk
  int lifts;          // where the scales lie, from there
  short matrix;
  u8 first, last;     // warpgroups that have a part of it
};

DEVICE uint4 stream4(const u8 *p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

DEVICE void read(Words &words, const u8 *weights, int lifts) {
  words.half[0] = stream4(weights), words.half[1] = stream4(weights + WEIGHTS_BYTES / 2);
  if (GROUPS == 1) words.lift = make_uint2(__ldg((const u16 *)(weights + lifts)), 0);
  if (GROUPS == 2) words.lift = make_uint2(__ldg((const u32 *)(weights + lifts)), 0);
  if (GROUPS == 4) words.lift = __ldg((const uint2 *)(weights + lifts));
}

DEVICE void copy_async(u32 to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

DEVICE float shared_float(u32 address) { return __uint_as_float(load_shared(address)); }
DEVICE float shared_bfloat16(u32 address) {
  return __uint_as_float(load_shared_half(address) << 16);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode(const __grid_constant__ Problem p) {
  extern __shared__ __align__(1024) u8 memory[];
  __shared__ __align__(8) u64 ready_barrier;
  __shared__ short first_tile[WARPGROUPS];
  // What lies where.
  u32 codes = (shared_address(memory) + 1023) & ~1023u;
  u32 inner = codes + p.units * CODES_BYTES;
  int inner_bytes = INNER_PARTS * p.rank_steps * p.tokens * 32;
  u32 scales = inner + inner_bytes, z = scales + 32;         // z: [8 rank_steps, M]
  u32 factors = z + p.rank_steps * p.tokens * 32;            // [tiles, 16]
  u32 biases = factors + p.most_tiles * ROWS * 4;            // [tiles, 16]
  u32 outer = biases + p.most_tiles * ROWS * 4;              // [tiles, most_steps, OUTER_BYTES]
  u32 parts = outer + p.most_tiles * p.most_steps * OUTER_BYTES;  // [warps, parts, M, ROWS]
  Tile *tiles = (Tile *)(memory + (parts - shared_address(memory)) +
                         WARPS * p.parts * p.tokens * ROWS * 4);

  // The same in all lanes: the compiler then counts in registers that a warp has but once.
  int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  int group = warp / SLICES, slice = warp % SLICES;
  int begin = (long long)p.tiles * blockIdx.x / gridDim.x;
  int count = (int)((long long)p.tiles * (blockIdx.x + 1) / gridDim.x) - begin;
  int units = count * p.units;
  u32 ready = shared_address(&ready_barrier);
  if (threadIdx.x == 0) barrier_init(ready, 1), barrier_init_visible();
  if (threadIdx.x < WARPGROUPS)
    first_tile[threadIdx.x] = units * threadIdx.x / WARPGROUPS / p.units;
  for (int i = threadIdx.x; i < count; i += THREADS) {
    Tile &t = tiles[i];
    int index = begin + i;
    t.matrix = 0;
#pragma unroll
    for (int m = 1; m < MATRICES; ++m) t.matrix += index >= p.matrices[m].first;
    index -= p.matrices[t.matrix].first;
    t.weights = p.matrices[t.matrix].chunks + (u64)(index / 4) * p.depth * CHUNK_BYTES +
                index % 4 * PIECE_BYTES;
    t.lifts = WEIGHTS_BYTES - index % 4 * (PIECE_BYTES - ROWS * GROUPS);
    // Warpgroup g has the units from units * g / WARPGROUPS on.
    t.first = (i * p.units * WARPGROUPS + WARPGROUPS - 1) / units;
    if (units * t.first / WARPGROUPS > i * p.units) --t.first;
    t.last = ((i + 1) * p.units * WARPGROUPS - 1) / units;
  }
  __syncthreads();
  launch_dependents();

  int unit = units * group / WARPGROUPS, end = units * (group + 1) / WARPGROUPS;
  // What this lane reads next.
  int next_tile = unit / p.units, next_place = unit % p.units, left = end - unit, lifts;
  const u8 *weights;
  auto enter = [&]() {
    const Tile &t = tiles[next_tile];
    weights = t.weights + (u64)(next_place * SLICES + slice) * CHUNK_BYTES + lane * 16;
    lifts = t.lifts + lane / 4 * 2 * GROUPS - lane * 16;
  };
  auto read_next = [&](Words &words) {
    if (left <= 0) return;
    --left;
    // Beyond K nothing is read, and activations are 0.
    if (p.depth % SLICES == 0 || next_place * SLICES + slice < p.depth)
      read(words, weights, lifts);
    else
      words.lift = make_uint2(0, 0);
    weights += SLICES * CHUNK_BYTES;
    if (++next_place == p.units) {
      next_place = 0, ++next_tile;
      if (left > 0) enter();
    }
  };
  if (left > 0) enter();
  Words ahead[AHEAD];
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) read_next(ahead[i]);

  // Constants of the rows, for the end.
  for (int i = threadIdx.x; i < count * 4; i += THREADS) {
    const Matrix &matrix = p.matrices[tiles[i / 4].matrix];
    int at = (begin + i / 4 - matrix.first) * ROWS + i % 4 * 4;
    copy_async(factors + i * 16, matrix.row_factor + at);
    if (matrix.bias) copy_async(biases + i * 16, matrix.bias + at);
  }
  int pieces = p.most_steps * 16;  // of B for a tile, of 16 bytes
  for (int i = threadIdx.x; i < count * pieces; i += THREADS) {
    const Matrix &matrix = p.matrices[tiles[i / pieces].matrix];
    int at = begin + i / pieces - matrix.first, step = i % pieces / 16;
    if (step < matrix.rank_steps)
      copy_async(outer + i * 16, matrix.outer +
                                     ((u64)(at / 4) * matrix.rank_steps + step) * 4 * OUTER_BYTES +
                                     at % 4 * OUTER_BYTES + i % 16 * 16);
  }

  if (threadIdx.x == 0) {
    wait_for_inputs();
    int bytes = p.units * CODES_BYTES, scale_bytes = (p.tokens + 3) / 4 * 16;
    barrier_expect(ready, bytes + scale_bytes + inner_bytes);
    copy(codes, p.codes, bytes, ready);
    copy(scales, p.token_scale, scale_bytes, ready);
    if (inner_bytes) copy(inner, p.inner, inner_bytes, ready);
  }
  barrier_wait(ready, 0);
  for (int i = threadIdx.x; i < p.rank_steps * 8 * p.tokens; i += THREADS) {
    int rank = i / p.tokens, m = i % p.tokens;
    float sum = 0;
#pragma unroll
    for (int part = 0; part < INNER_PARTS; ++part) {
      u32 from = inner + ((part * p.rank_steps + rank / 8) * p.tokens + m) * 32 + rank % 8 * 2;
      sum += shared_bfloat16(from) + shared_bfloat16(from + 16);
    }
    store_shared(z + i * 4, __float_as_uint(sum));
  }
  if (p.depth % SLICES) {  // chunks that are not there
    int missing = SLICES - p.depth % SLICES;
    for (int i = threadIdx.x; i < TOKENS / SLICES * missing * 8; i += THREADS) {
      int row = i / 8 / missing * SLICES + p.depth % SLICES + i / 8 % missing;
      u32 to = codes + (p.units - 1) * CODES_BYTES + row * CHUNK_COLUMNS + i % 8 * 16;
      *(uint4 *)(memory + (to - shared_address(memory))) = make_uint4(0, 0, 0, 0);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  }

  int place = unit % p.units;  // in its tile
  u32 part = parts + warp * p.parts * p.tokens * ROWS * 4;
  float sums[TOKENS / 2];
#pragma unroll
  for (int e = 0; e < TOKENS / 2; ++e) sums[e] = 0;
  auto leave = [&]() {
#pragma unroll
    for (int m = 0; m < TOKENS / SLICES; ++m) {
      float *of = sums + m / 2 * 4;
      if (m < p.tokens && lane % 4 == m % 2 * 2 + slice / 2) {
        u32 to = part + (m * ROWS + lane / 4) * 4;
        store_shared(to, __float_as_uint(slice % 2 ? of[1] : of[0]));
        store_shared(to + 32, __float_as_uint(slice % 2 ? of[3] : of[2]));
      }
    }
#pragma unroll
    for (int e = 0; e < TOKENS / 2; ++e) sums[e] = 0;
    part += p.tokens * ROWS * 4;
  };
  if (unit == end) leave();
  while (unit < end) {
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (unit >= end) break;
      Weights w;
      convert(w, ahead[i], p.books);
      u64 operand = operand_128(codes + place * CODES_BYTES);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) wgmma_e4m3(sums, w[k], operand + k * 2);
      wgmma_commit();
      wgmma_wait<0>();
      read_next(ahead[i]);
      ++unit, ++place;
      if (place == p.units || unit == end) leave(), place = 0;
    }
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  for (int i = threadIdx.x; i < count * ROWS * p.tokens; i += THREADS) {
    int m = i / (count * ROWS), of = i % (count * ROWS), at = of / ROWS, row = of % ROWS;
    const Tile &t = tiles[at];
    const Matrix &matrix = p.matrices[t.matrix];
    int n = (begin + at - matrix.first) * ROWS + row;
    if (n >= matrix.rows) continue;
    float sum = 0;
    for (int g = t.first; g <= t.last; ++g)
#pragma unroll
      for (int s = 0; s < SLICES; ++s)
        sum += shared_float(
            parts + ((((g * SLICES + s) * p.parts + at - first_tile[g]) * p.tokens + m) * ROWS + row) * 4);
    float y = sum * shared_float(factors + of * 4) * shared_float(scales + m * 4);
    for (int rank = 0; rank < matrix.rank_steps * 8; ++rank) {
      u32 from = outer + (at * p.most_steps + rank / 8) * OUTER_BYTES +
                 (row % 8 * 4 + rank % 8 / 2) * 8 + row / 8 * 4 + rank % 2 * 2;
      y += shared_bfloat16(from) *
           shared_float(z + ((matrix.rank_step * 8 + rank) * p.tokens + m) * 4);
    }
    if (matrix.bias) y += shared_float(biases + of * 4);
    u16 out;
    if (HALF)
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out) : "f"(y));
    else
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(y));
    matrix.y[(u64)m * matrix.rows + n] = out;
  }
}
