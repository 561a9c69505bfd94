// The E4M3 matrix of a layer, row by row, from its chunks.
//
// A warp takes 16 rows of DEPTH neighbouring chunks; through shared memory it turns the order of a
// tensor-core operand into rows, so that it writes 128 neighbouring bytes of a row at once.
//
// Given by the compiler's command line: GROUPS, BOOKS (as in multiply.cu), DEPTH.
#include "chunk.cuh"
#include "codebook.cuh"

constexpr int CHUNK_BYTES = CHUNK_ROWS * CHUNK_COLUMNS / 2 + CHUNK_ROWS * GROUPS;

struct Problem {
  const u8 *chunks;         // [ceil(N / 64), depth, CHUNK_BYTES]
  u8 *matrix;               // [rows, columns], columns a multiple of 16
  int rows, columns, depth;  // of the matrix; depth of the chunks
  Books books;
};

extern "C" __global__ void __launch_bounds__(128) expand(const __grid_constant__ Problem p) {
  __shared__ __align__(128) u8 tiles[4][16 * CHUNK_COLUMNS];
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  int row_tile = blockIdx.y, first = blockIdx.x * DEPTH;
  const u8 *chunks = p.chunks + ((u64)row_tile * p.depth + first) * CHUNK_BYTES;
  uint4 words[DEPTH][2];
  uint2 lifts[DEPTH];
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) {
    if (first + d >= p.depth) break;
    const u8 *chunk = chunks + d * CHUNK_BYTES;
    words[d][0] = __ldg((const uint4 *)(chunk + thread * 16));
    words[d][1] = __ldg((const uint4 *)(chunk + 2048 + thread * 16));
    const u8 *lift = chunk + CHUNK_ROWS * CHUNK_COLUMNS / 2 + thread / 4 * GROUPS * 2;
    if (GROUPS == 1) lifts[d] = make_uint2(__ldg((const u16 *)lift), 0);
    if (GROUPS == 2) lifts[d] = make_uint2(__ldg((const u32 *)lift), 0);
    if (GROUPS == 4) lifts[d] = __ldg((const uint2 *)lift);
  }
  u32 tile = shared_address(tiles[warp]);
  int row = lane / 4, t = lane % 4;
#pragma unroll
  for (int d = 0; d < DEPTH; ++d) {
    if (first + d >= p.depth) break;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      int group = k * GROUPS / 4;
      u32 pair = (group & 2 ? lifts[d].y : lifts[d].x) >> (group & 1 ? 16 : 0);
      uint4 w = words[d][k / 2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {  // rows `row` and `row + 8`
        u32 left, right;
        to_e4m3(k % 2 ? (h ? w.w : w.z) : (h ? w.y : w.x), table(p.books, pair >> h * 8 & 255),
                left, right);
        u32 line = tile + (row + h * 8) * CHUNK_COLUMNS + t * 4;
        store_shared(line + ((k * 2) ^ row) * 16, left);
        store_shared(line + ((k * 2 + 1) ^ row) * 16, right);
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int from = i * 4 + lane / 8, piece = lane % 8;
      int n = row_tile * CHUNK_ROWS + warp * 16 + from;
      int k = (first + d) * CHUNK_COLUMNS + piece * 16;
      uint4 out = load_shared4(tile + from * CHUNK_COLUMNS + ((piece ^ (from & 7)) * 16));
      if (n < p.rows && k < p.columns) store_global(p.matrix + (u64)n * p.columns + k, out);
    }
    __syncwarp();
  }
}
