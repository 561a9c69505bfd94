// A product cut up: sizes, what a block has to do, and what lies where in its shared memory.
#pragma once
#include "chunk.cuh"
#include "codebook.cuh"

constexpr int ROW_TILES = WARPGROUPS * TILES;  // of 64 features, in a block
constexpr int CHUNK_BYTES = CHUNK_ROWS * CHUNK_COLUMNS / 2 + CHUNK_ROWS * GROUPS;
constexpr int OUTER_BYTES = CHUNK_ROWS * 16;  // 64 rows of B, 8 ranks in bfloat16
constexpr int CODES_BYTES = TOKENS * CHUNK_COLUMNS;
constexpr int INNER_BYTES = TOKENS * 32;  // z of 8 ranks
constexpr int STAGE_BYTES = CODES_BYTES + ROW_TILES * CHUNK_BYTES;
constexpr int BLOCKS_OF_8 = TOKENS / 8;
constexpr int PARTS = SHARES * SPLIT;  // sums that are added up, by slices of the tokens
constexpr int SLICES = PARTS < BLOCKS_OF_8 ? PARTS : BLOCKS_OF_8;
constexpr int SLICE = BLOCKS_OF_8 / SLICES;  // blocks of 8 tokens
constexpr int EXCHANGE_BYTES =
    PARTS > 1 ? (SLICES + SPLIT - 1) / SPLIT * PARTS * ROW_TILES * SLICE * 2048 : 0;
constexpr bool IN_STAGES = EXCHANGE_BYTES > LARGEST_EXCHANGE;  // when these are done with
constexpr int EXCHANGES = STREAM ? 2 : 1;                      // in use by turns
constexpr int TOGETHER = SLICE < 4 ? SLICE : 4;  // blocks of 8 tokens that are written at once
constexpr int STAGING_BYTES = TOGETHER * 8 * CHUNK_ROWS * 2;  // for each warpgroup, twice
constexpr int CONSUMERS = WARPGROUPS * SHARES * 128;
constexpr int TOKEN_TILES_TOGETHER = 8;  // that meet a stretch of weights before the next stretch
// Converted weights in registers: one chunk in use and one in the making, where there is room, and
// few warpgroups to take turns.
constexpr int BUFFERS = WARPGROUPS * SHARES > 2 && TOKENS * TILES >= 128 ? 1 : 2;
constexpr int PARTS_MEET = 15;  // a barrier among threads, beside one for each warpgroup
constexpr int MATRICES = 4;  // at most

static_assert(STAGES >= 2 * SHARES, "a warpgroup gives a stage back when it has the next");
static_assert(!PERSISTENT || STREAM || PARTS == 1, "sums meet once, after the last tile");
static_assert(!STREAM || (SPLIT * PAIR == 1 && !IN_STAGES), "stages are in use from tile to tile");
static_assert(INNER_PARTS * INNER_BYTES <= CODES_BYTES, "z takes the place of activations");
static_assert(INNER_PARTS == 1 || PAIR == 1, "parts are not shared out to neighbours");
static_assert(!IN_STAGES || EXCHANGE_BYTES <= STAGES * STAGE_BYTES, "the stages have to hold it");

// Weights that the activations meet.
struct Matrix {
  const u8 *chunks;         // [ceil(N / 64), ceil(K / 128), CHUNK_BYTES]
  const u8 *outer;          // B: [ceil(N / 64), rank steps, 128 threads, 4] bfloat16
  const float *row_factor;  // [ceil(N / 64) * 64]
  const float *bias;        // the same, or null
  u16 *y;                   // [M, N]
  int rows;                 // N
  int stretch;              // its first, of ROW_TILES * PAIR tiles; they are counted on
  int rank_steps;           // ceil(r / 8)
  int rank_step;            // its first in z
};

struct Problem {
  const u8 *codes;           // [ceil(K / 128), M, 128] E4M3, 16-byte pieces swizzled by row % 8
  const float *token_scale;  // [M]
  const u8 *inner;           // z: [INNER_PARTS, rank steps, M, 16] bfloat16, 8 high and 8 low parts
  float4 *workspace;         // STREAM: [blocks, SLICES, ROW_TILES, SLICE, 128 threads]
  u32 *flags;                // STREAM: [blocks, SLICES, WARPGROUPS], 0 at first
  int tokens, depth;         // M, ceil(K / 128)
  int stretches, rank_steps;  // of all matrices
  Books books;
  Matrix matrices[MATRICES];
};

struct Tile {
  int matrix;
  int token, row_tile;    // the first of each
  int tokens, row_tiles;  // how many there are
};

DEVICE Tile tile_at(const Problem &p, int index, int pair) {
  int token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
  int width = TOKEN_TILES_TOGETHER * p.stretches;
  int first = index / width * TOKEN_TILES_TOGETHER;
  int together = min(token_tiles - first, TOKEN_TILES_TOGETHER);
  int within = index % width;
  Tile t;
  t.token = (first + within % together) * TOKENS;
  int stretch = within / together;
  t.matrix = 0;
#pragma unroll
  for (int i = 1; i < MATRICES; ++i) t.matrix += stretch >= p.matrices[i].stretch;
  const Matrix &matrix = p.matrices[t.matrix];
  int row_tiles = (matrix.rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
  t.row_tile = ((stretch - matrix.stretch) * PAIR + pair) * ROW_TILES;
  t.tokens = min(TOKENS, p.tokens - t.token);
  t.row_tiles = max(0, min(ROW_TILES, row_tiles - t.row_tile));
  return t;
}

DEVICE int tile_count(const Problem &p) {
  return (p.tokens + TOKENS - 1) / TOKENS * p.stretches;
}

// What a block has to do: tile after tile, its stretch of K.
struct Work {
  int index, begin, end;  // tile; 128 columns each
  bool owns;              // writes the tile, and so has B z
  int step, last, depth;

  DEVICE Work(const Problem &p, int cluster, int clusters, int stretch) {
    depth = p.depth;
    if (STREAM) {
      end = start(p, cluster, clusters);  // the next unit
      last = start(p, cluster + 1, clusters);
    } else {
      index = cluster - clusters, step = clusters, last = tile_count(p);
      begin = depth * stretch / SPLIT, end = depth * (stretch + 1) / SPLIT;
      owns = stretch == 0;
    }
    unit = end;
  }
  // The first unit of a block.
  static DEVICE int start(const Problem &p, int cluster, int clusters) {
    return (long long)tile_count(p) * p.depth * cluster / clusters;
  }
  DEVICE bool next() {
    if (!STREAM) return (index += step) < last;
    if (unit >= last) return false;
    index = unit / depth, begin = unit - index * depth;
    end = min(depth, begin + last - unit);
    unit += end - begin;
    owns = PERSISTENT ? begin == 0 : end == depth;
    return true;
  }

 private:
  int unit;
};

// What lies in shared memory, by address.
struct Shared {
  u32 stages, staging, exchange, barriers;
  DEVICE u32 codes(int slot) const { return stages + slot * CODES_BYTES; }
  DEVICE u32 weights(int slot) const {
    return stages + STAGES * CODES_BYTES + slot * ROW_TILES * CHUNK_BYTES;
  }
  DEVICE u32 full(int slot) const { return barriers + slot * 8; }
  DEVICE u32 empty(int slot) const { return barriers + (STAGES + slot) * 8; }
};

// One step of a ring of STAGES slots.
struct Step {
  int slot;
  u32 parity;
  DEVICE explicit Step(int index) : slot(index % STAGES), parity(index / STAGES & 1) {}
  DEVICE void next(int steps = 1) {
    slot += steps;
    if (slot >= STAGES) slot -= STAGES, parity ^= 1;
  }
};
