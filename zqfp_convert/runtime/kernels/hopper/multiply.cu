// y = W^ x^ + B z + bias: 4-bit weights become E4M3 in registers, on the way to the tensor cores.
//
// The product is made transposed, y^T = W x^T: the weights are operand A, which wgmma takes from
// registers, the activations operand B, from shared memory. One warp copies, WARPGROUPS others
// convert and multiply. Each warpgroup has TILES times 64 output features, all have the same TOKENS.
//
// K is shared out twice: a block's SHARES warpgroups of the same features take turns with the stages,
// and SPLIT blocks of a cluster have a stretch of K each. All their partial sums meet in shared
// memory and are added up in a fixed order. A cluster is PAIR times SPLIT blocks: PAIR neighbours
// have the same activations, of which each copies its part to all.
//
// With STREAM the work is one row of units, 128 columns of a tile each, tile after tile, and every
// block takes an equal stretch of it, so all multiprocessors read as much. A tile that several blocks
// have a part of is written by one of them, which adds up what the others leave in the workspace. It
// never waits for long: PERSISTENT blocks end with a tile's first columns, which the next blocks went
// on from when they began; otherwise a tile's last columns come in the block that is launched last.
//
// Given by the compiler's command line: TOKENS, WARPGROUPS, TILES, STAGES, SHARES, SPLIT, PAIR,
// STREAM, PERSISTENT, BLOCKS (that share a multiprocessor), COPIERS (threads: 32, 64, or 128 that give registers away,
// down to COPIER_REGISTERS, so that the others have CONSUMER_REGISTERS), GROUPS (scales in 128
// columns: 1, 2 or 4), HALF (float16 results).
#include "common.cuh"
#include "wgmma.cuh"

constexpr int ROW_TILES = WARPGROUPS * TILES;  // of 64 features, in a block
constexpr int CHUNK_BYTES = CHUNK_ROWS * CHUNK_COLUMNS / 2 + CHUNK_ROWS * GROUPS;
constexpr int OUTER_BYTES = CHUNK_ROWS * 16;  // 64 rows of B, 8 ranks in bfloat16
constexpr int CODES_BYTES = TOKENS * CHUNK_COLUMNS;
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

static_assert(STAGES >= 2 * SHARES, "a warpgroup gives a stage back when it has the next");
static_assert(!STREAM || (SPLIT * PAIR == 1 && !IN_STAGES), "stages are in use from tile to tile");
static_assert(!IN_STAGES || EXCHANGE_BYTES <= STAGES * STAGE_BYTES, "the stages have to hold it");

struct Problem {
  const u8 *codes;           // [ceil(K / 128), M, 128] E4M3, 16-byte pieces swizzled by row % 8
  const float *token_scale;  // [M]
  const u8 *inner;           // z: [rank steps, M, 16] bfloat16, 8 high parts and 8 low parts
  const u8 *chunks;          // [ceil(N / 64), ceil(K / 128), CHUNK_BYTES]
  const u8 *outer;           // B: [ceil(N / 64), rank steps, 128 threads, 4] bfloat16
  const float *row_factor;   // [ceil(N / 64) * 64]
  const float *bias;         // the same, or null
  u16 *y;                    // [M, N]
  float4 *workspace;         // STREAM: [blocks, SLICES, ROW_TILES, SLICE, 128 threads]
  u32 *flags;                // STREAM: [blocks, SLICES, WARPGROUPS], 0 at first
  int tokens, rows, depth;   // M, N, ceil(K / 128)
  int rank_steps;            // ceil(r / 8)
};

struct Tile {
  int token, row_tile;    // the first of each
  int tokens, row_tiles;  // how many there are
};

DEVICE Tile tile_at(const Problem &p, int index, int pair) {
  int token_tiles = (p.tokens + TOKENS - 1) / TOKENS;
  int row_tiles = (p.rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
  int stretches = (row_tiles + ROW_TILES * PAIR - 1) / (ROW_TILES * PAIR);
  int width = TOKEN_TILES_TOGETHER * stretches;
  int first = index / width * TOKEN_TILES_TOGETHER;
  int together = min(token_tiles - first, TOKEN_TILES_TOGETHER);
  int within = index % width;
  Tile t;
  t.token = (first + within % together) * TOKENS;
  t.row_tile = (within / together * PAIR + pair) * ROW_TILES;
  t.tokens = min(TOKENS, p.tokens - t.token);
  t.row_tiles = max(0, min(ROW_TILES, row_tiles - t.row_tile));
  return t;
}

DEVICE int tile_count(const Problem &p) {
  int row_tiles = (p.rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
  return (p.tokens + TOKENS - 1) / TOKENS *
         ((row_tiles + ROW_TILES * PAIR - 1) / (ROW_TILES * PAIR));
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

// ---- The warp that copies.

// Where the bytes of a tile's next stage come from. With little to copy in a stage the time goes
// into finding out what: so nothing is multiplied here.
struct Source {
  const Shared &s;
  Tile t;
  int pair;
  const u8 *tiles, *tokens;  // of weights or B, of activations or z
  u64 tile_step, tile_apart, token_step;
  u32 tile_bytes, token_bytes;  // of a tile of 64 rows, of a token

  DEVICE Source(const Problem &p, const Shared &s, const Tile &t, int pair, int k)
      : s(s), t(t), pair(pair) {
    tile_bytes = tile_step = CHUNK_BYTES, token_bytes = CHUNK_COLUMNS;
    start(p, p.chunks, p.codes, p.depth, k);
  }
  DEVICE void compensation(const Problem &p) {
    tile_bytes = tile_step = OUTER_BYTES, token_bytes = 32;
    start(p, p.outer, p.inner, p.rank_steps, 0);
  }
  DEVICE void start(const Problem &p, const u8 *of_tiles, const u8 *of_tokens, int steps, int step) {
    tile_apart = (u64)steps * tile_bytes;
    tiles = of_tiles + t.row_tile * tile_apart + (u64)step * tile_bytes;
    token_step = (u64)p.tokens * token_bytes;
    tokens = of_tokens + step * token_step + (u64)t.token * token_bytes;
  }

  DEVICE void expect(int slot) const {
    barrier_expect(s.full(slot), t.tokens * token_bytes + t.row_tiles * tile_bytes);
  }
  // Constants, so they may be copied before the kernel ahead has ended.
  DEVICE void copy_tiles(int slot) {
    const u8 *from = tiles;
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i, from += tile_apart)
      if (i < t.row_tiles)
        copy(s.weights(slot) + i * tile_bytes, from, tile_bytes, s.full(slot));
    tiles += tile_step;
  }
  DEVICE void copy_tokens(int slot) {
    if (PAIR == 1) {
      copy(s.codes(slot), tokens, t.tokens * token_bytes, s.full(slot));
    } else {
      constexpr int PART = TOKENS / PAIR;
      int part = min(PART, t.tokens - pair * PART), at = pair * PART * token_bytes;
      // The pair's ranks in the cluster: those of the same stretch of K.
      u16 mask = ((1 << PAIR) - 1) << (cluster_rank() / PAIR * PAIR);
      if (part > 0)
        copy_to_all(s.codes(slot) + at, tokens + at, part * token_bytes, s.full(slot), mask);
    }
    tokens += token_step;
  }
};

// Copies all stages: the thread that copies the weights also says how much there is to come.
// `tiles`, `tokens`: which part this thread copies, or both.
DEVICE void produce(const Problem &p, const Shared &s, int pair, Work work, bool tiles,
                    bool tokens) {
  Step step(0);
  bool wrapped = false;  // the ring has been filled once, so slots have to be waited for
  auto copy_stages = [&](Source &source, int count) {
    for (int i = 0; i < count; ++i) {
      if (wrapped) barrier_wait(s.empty(step.slot), step.parity ^ 1);
      if (tiles) {
        source.expect(step.slot);
        source.copy_tiles(step.slot);
      }
      if (tokens) source.copy_tokens(step.slot);
      step.next();
      wrapped |= step.slot == 0;
    }
  };
  bool waited = !tokens;
  while (work.next()) {
    Source source(p, s, tile_at(p, work.index, pair), pair, work.begin);
    int count = work.end - work.begin;
    if (!waited) {
      int ahead = tiles ? min(STAGES, count) : 0;
      for (int i = 0; i < ahead; ++i) {
        source.expect(i);
        source.copy_tiles(i);
      }
      wait_for_inputs();
      for (int i = 0; i < ahead; ++i) {
        source.copy_tokens(i);
        step.next();
      }
      wrapped = ahead > 0 && step.slot == 0;
      count -= ahead;
      waited = true;
    }
    copy_stages(source, count);
    if (work.owns && p.rank_steps) {
      source.compensation(p);
      copy_stages(source, p.rank_steps);
    }
  }
}

// ---- The warpgroups that multiply.

// A thread's part of a chunk, 64 x 128 weights: a wgmma of 32 columns takes four registers, of rows
// lane / 4 and lane / 4 + 8 of the warp's sixteen.
typedef u32 Weights[4][4];

// The same, as it lies in shared memory.
struct Words {
  uint4 half[2];
  uint2 lift;
};

DEVICE void load_words(Words &words, u32 chunk, int thread) {
  u32 lifts = chunk + CHUNK_ROWS * CHUNK_COLUMNS / 2 + thread / 4 * GROUPS * 2;
  words.half[0] = load_shared4(chunk + thread * 16);
  words.half[1] = load_shared4(chunk + 2048 + thread * 16);
  if (GROUPS == 1) words.lift = make_uint2(load_shared_half(lifts), 0);
  if (GROUPS == 2) words.lift = make_uint2(load_shared(lifts), 0);
  if (GROUPS == 4) words.lift = load_shared2(lifts);
}

DEVICE void convert(Weights &w, const Words &words) {
  Table upper, lower;
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // steps of 32 columns
    if (k * GROUPS % 4 == 0) {
      int group = k * GROUPS / 4;
      u32 pair = (group & 2 ? words.lift.y : words.lift.x) >> (group & 1 ? 16 : 0);
      upper = table(pair & 255), lower = table(pair >> 8 & 255);
    }
    uint4 half = words.half[k / 2];
    to_e4m3(k % 2 ? half.z : half.x, upper, w[k][0], w[k][2]);
    to_e4m3(k % 2 ? half.w : half.y, lower, w[k][1], w[k][3]);
  }
}

typedef float Sums[TILES][TOKENS / 2];

DEVICE void release(const Shared &s, int slot, int lane, int first_rank) {
  if (PAIR == 1) {
    if (lane == 0) barrier_arrive(s.empty(slot));
  } else if (lane < PAIR) {
    barrier_arrive_at(s.empty(slot), first_rank + lane);
  }
}

constexpr int SCALES = (TOKENS + 31) / 32;

struct Factors {
  float upper[TILES], lower[TILES], token[SCALES];
};

struct Consumer {
  const Problem &p;
  const Shared &s;
  int group, share;        // which features, which stages
  int thread, lane, warp;  // in the warpgroup
  int stretch, pair;       // of the block in its cluster
  u32 exchange_now;        // where partial sums meet

  DEVICE void fetch(Words &words, const Step &step, int tile) const {
    load_words(words, s.weights(step.slot) + (group * TILES + tile) * CHUNK_BYTES, thread);
  }

  // Multiplies a chunk. The products run on; those of the chunk before have ended when this returns.
  DEVICE void chunk(Sums &sums, Weights &w, const Words &words, const Step &step, int tile) const {
    if (BUFFERS == 1) wgmma_wait<0>();
    convert(w, words);
    u64 codes = operand_128(s.codes(step.slot));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_e4m3(sums[tile], w[k], codes + k * 2);
    wgmma_commit();
    if (BUFFERS == 2) wgmma_wait<1>();
  }

  DEVICE void stage(Sums &sums, Weights &first, Weights &second, Step &step, int &before) const {
    Words words;
    barrier_wait(s.full(step.slot), step.parity);
    fetch(words, step, 0);
    chunk(sums, first, words, step, 0);
    if (before >= 0) release(s, before, lane, stretch * PAIR);
    before = step.slot;
    if (TILES == 2) {
      fetch(words, step, TILES - 1);
      chunk(sums, second, words, step, TILES - 1);
    }
    step.next(SHARES);
  }

  // The stages first, first + SHARES, ... of the ring, as many as `depth`.
  DEVICE void multiply(Sums &sums, int first, int depth) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < TOKENS / 2; ++j) sums[i][j] = 0;
    if (depth == 0) return;
    Step step(first);
    Weights even, odd;
    int before = -1, k = 0;
    for (; k + 1 < depth; k += 2) {
      stage(sums, even, BUFFERS == 1 ? even : odd, step, before);
      stage(sums, TILES == 2 || BUFFERS == 1 ? even : odd, BUFFERS == 1 ? even : odd, step, before);
    }
    if (k < depth) stage(sums, even, BUFFERS == 1 ? even : odd, step, before);
    wgmma_wait<0>();
    release(s, before, lane, stretch * PAIR);
  }

  DEVICE void load(Factors &f, const Tile &t) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      bool there = t.row_tiles > group * TILES + i;
      f.upper[i] = there ? p.row_factor[row(t, i)] : 0;
      f.lower[i] = there ? p.row_factor[row(t, i) + 8] : 0;
    }
  }

  // The tokens' scales, spread over the lanes.
  DEVICE void load_tokens(Factors &f, const Tile &t) const {
#pragma unroll
    for (int i = 0; i < SCALES; ++i) {
      int m = i * 32 + lane;
      f.token[i] = m < t.tokens ? load_result(p.token_scale + t.token + m) : 0;
    }
  }

  // The row and token scales.
  DEVICE void scale(Sums &sums, const Factors &f) const {
#pragma unroll
    for (int j = 0; j < BLOCKS_OF_8; ++j) {
      int from = j % 4 * 8 + lane % 4 * 2;
      float first = __shfl_sync(~0u, f.token[j / 4], from);
      float second = __shfl_sync(~0u, f.token[j / 4], from + 1);
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        float *v = sums[i] + j * 4;
        v[0] *= first * f.upper[i], v[1] *= second * f.upper[i];
        v[2] *= first * f.lower[i], v[3] *= second * f.lower[i];
      }
    }
  }

  // Low-rank compensation: B z, where both halves of an operand row meet the same B.
  DEVICE void compensate(Sums &sums, int first) const {
    Step step(first);
    for (int r = 0; r < p.rank_steps; ++r) {
      barrier_wait(s.full(step.slot), step.parity);
      u32 outer[TILES][4];
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        uint2 v = load_shared2(s.weights(step.slot) + (group * TILES + i) * OUTER_BYTES + thread * 8);
        outer[i][0] = outer[i][2] = v.x, outer[i][1] = outer[i][3] = v.y;
      }
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < TILES; ++i)
        wgmma_bf16(sums[i], outer[i], operand_32(s.codes(step.slot)));
      wgmma_commit();
      wgmma_wait<0>();
      release(s, step.slot, lane, stretch * PAIR);
      step.next();
    }
  }

  DEVICE int row(const Tile &t, int i) const {
    return (t.row_tile + group * TILES + i) * CHUNK_ROWS + warp * 16 + lane / 4;
  }

  // Writes COUNT blocks of 8 tokens from `token` of the tile on, through shared memory, so that
  // whole lines of 64 neighbouring features are written at once: anything less is far slower.
  template <int COUNT>
  DEVICE void store(float (&v)[TILES][COUNT * 4], const Tile &t, int token) const {
    int self = share * WARPGROUPS + group;
    u32 staging = s.staging + self * 2 * STAGING_BYTES;
    // A matrix of 8 x 8 for each 8 lanes: features 0 and 8 of the warp's, then 8 tokens further.
    u32 to = staging + (lane / 16 * 8 + lane % 8) * 128 +
             ((warp * 2 + (lane / 8 & 1)) ^ (lane % 8)) * 16;
    u32 from = staging + thread / 8 * 128 + ((thread % 8) ^ (thread / 8 % 8)) * 16;
    bool aligned = p.rows % 8 == 0;
    u64 down = (u64)16 * p.rows;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (group * TILES + i >= t.row_tiles) break;
      if (p.bias) {
        float upper = p.bias[row(t, i)], lower = p.bias[row(t, i) + 8];
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
          v[i][j * 4] += upper, v[i][j * 4 + 1] += upper;
          v[i][j * 4 + 2] += lower, v[i][j * 4 + 3] += lower;
        }
      }
      int feature = (t.row_tile + group * TILES + i) * CHUNK_ROWS + thread % 8 * 8;
      u16 *line = p.y + (u64)(t.token + token + thread / 8) * p.rows + feature;
      int left = feature < p.rows ? t.tokens - token - thread / 8 : 0;
#pragma unroll
      for (int j = 0; j < COUNT; j += TOGETHER) {
        u32 half = (i * COUNT + j) / TOGETHER % 2 * STAGING_BYTES;
#pragma unroll
        for (int b = 0; b < TOGETHER; b += 2) {
          float *of = v[i] + (j + b) * 4;
          u32 top = pack(of[0], of[1]), bottom = pack(of[2], of[3]);
          if (TOGETHER == 1)
            asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                             to + half),
                         "r"(top), "r"(bottom)
                         : "memory");
          else
            asm volatile(
                "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                    to + half + b * 1024),
                "r"(top), "r"(bottom), "r"(pack(of[4], of[5])), "r"(pack(of[6], of[7]))
                : "memory");
        }
        // One barrier for each half: who passes the next has read this one.
        sync_threads(1 + self, 128);
#pragma unroll
        for (int e = 0; e < TOGETHER * 8; e += 16) {
          if (j * 8 + e < left && (TOGETHER > 1 || thread < 64)) {
            uint4 out = load_shared4(from + half + e * 128);
            if (aligned)
              store_global(line, out);
            else
              write(line, out, p.rows - feature);
          }
          line += TOGETHER > 1 ? down : down / 2;
        }
      }
    }
    sync_threads(1 + self, 128);
  }

  // Up to 8 neighbouring features, one by one.
  static __device__ __noinline__ void write(u16 *to, uint4 out, int count) {
    u32 parts[4] = {out.x, out.y, out.z, out.w};
#pragma unroll
    for (int f = 0; f < 8; ++f)
      if (f < count) to[f] = (u16)(parts[f / 2] >> (f % 2 * 16));
  }

  // Two results in the output's dtype, the first in the low half.
  static DEVICE u32 pack(float first, float second) {
    u32 out;
    if (HALF)
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    else
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(second), "f"(first));
    return out;
  }

  // Where part `from` of slice q lies with the slice's owner.
  DEVICE u32 exchange(int q, int from, int i, int block) const {
    int tile = (q / SPLIT * PARTS + from) * ROW_TILES + group * TILES + i;
    return exchange_now + ((tile * SLICE + block) * 128 + thread) * 16;
  }

  // Hands the partial sums to the owners of the slices.
  DEVICE void send(Sums &sums) const {
#pragma unroll
    for (int q = 0; q < SLICES; ++q)
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int b = 0; b < SLICE; ++b) {
          float *v = sums[i] + (q * SLICE + b) * 4;
          u32 to = exchange(q, stretch * SHARES + share, i, b);
          if (SPLIT > 1) to = address_at(to, q % SPLIT * PAIR + pair);
          store_at(to, make_float4(v[0], v[1], v[2], v[3]));
        }
  }

  DEVICE void receive(float (&v)[TILES][SLICE * 4], int q) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int b = 0; b < SLICE; ++b) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int from = 0; from < PARTS; ++from) {
          float4 part = load_shared_float4(exchange(q, from, i, b));
          sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        v[i][b * 4] = sum.x, v[i][b * 4 + 1] = sum.y;
        v[i][b * 4 + 2] = sum.z, v[i][b * 4 + 3] = sum.w;
      }
  }
};

// Waits for all that add up the same sums.
DEVICE void sync_parts() {
  if (SPLIT > 1)
    cluster_sync();
  else if (SHARES > 1)
    sync_threads(PARTS_MEET, CONSUMERS);
}

// The end of a tile, or of a part of one, in a stream.
DEVICE void finish(Consumer &c, Sums &sums, const Work &work, const Tile &t, int block,
                   int blocks) {
  float v[TILES][SLICE * 4];
  if (SHARES > 1) {
    c.send(sums);
    sync_parts();
    if (c.share < SLICES) c.receive(v, c.share);
    c.exchange_now ^= c.s.exchange ^ (c.s.exchange + EXCHANGE_BYTES);
    if (c.share >= SLICES) return;
  } else {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < SLICE * 4; ++j) v[i][j] = sums[i][j];
  }
  auto place = [&](int of, int i, int b) {
    int tile = (of * SLICES + c.share) * ROW_TILES + c.group * TILES + i;
    return c.p.workspace + (tile * SLICE + b) * 128 + c.thread;
  };
  auto flag = [&](int of) { return c.p.flags + (of * SLICES + c.share) * WARPGROUPS + c.group; };
  if (work.owns) {
    int from = work.index * work.depth, to = from + work.depth;  // the tile's units
    bool whole = work.begin == 0 && work.end == work.depth;
    for (int other = block + (PERSISTENT ? 1 : -1); !whole; other += PERSISTENT ? 1 : -1) {
      if (PERSISTENT ? other >= blocks || Work::start(c.p, other, blocks) >= to
                     : other < 0 || Work::start(c.p, other + 1, blocks) <= from)
        break;
      while (load_acquire(flag(other)) == 0) {
      }
#pragma unroll
      for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int b = 0; b < SLICE; ++b) {
          float4 part = load_cached_globally(place(other, i, b));
          v[i][b * 4] += part.x, v[i][b * 4 + 1] += part.y;
          v[i][b * 4 + 2] += part.z, v[i][b * 4 + 3] += part.w;
        }
      sync_threads(1 + c.share * WARPGROUPS + c.group, 128);
      if (c.thread == 0) store_release(flag(other), 0);  // as it was found
    }
    c.store<SLICE>(v, t, c.share * SLICE * 8);
  } else {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int b = 0; b < SLICE; ++b)
        *place(block, i, b) =
            make_float4(v[i][b * 4], v[i][b * 4 + 1], v[i][b * 4 + 2], v[i][b * 4 + 3]);
    __threadfence();
    sync_threads(1 + c.share * WARPGROUPS + c.group, 128);
    if (c.thread == 0) store_release(flag(block), 1);
  }
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + COPIERS, BLOCKS)
    multiply(const __grid_constant__ Problem p) {
  extern __shared__ u8 memory[];
  Shared s;
  s.stages = (shared_address(memory) + 1023) & ~1023u;
  s.staging = s.stages + STAGES * STAGE_BYTES;
  u32 exchange = s.staging + WARPGROUPS * SHARES * 2 * STAGING_BYTES;
  s.exchange = IN_STAGES ? s.stages : exchange;
  s.barriers = exchange + (IN_STAGES ? 0 : EXCHANGES * EXCHANGE_BYTES);

  int rank = SPLIT * PAIR > 1 ? cluster_rank() : 0;
  int pair = rank % PAIR, stretch = rank / PAIR;
  int cluster = blockIdx.x / (SPLIT * PAIR), clusters = gridDim.x / (SPLIT * PAIR);
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(s.full(i), 1);
      barrier_init(s.empty(i), WARPGROUPS * 4 * PAIR);
    }
    barrier_init_visible();
  }
  if (SPLIT * PAIR > 1)
    cluster_sync();
  else
    __syncthreads();
  launch_dependents();

  Work work(p, cluster, clusters, stretch);
  int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
  if (threadIdx.x >= CONSUMERS) {
    if (COPIERS == 128) give_registers<COPIER_REGISTERS>();
    if (COPIERS == 32 && thread == 0) produce(p, s, pair, work, true, true);
    if (COPIERS > 32 && thread == 0) produce(p, s, pair, work, true, false);
    if (COPIERS > 32 && thread == 32) produce(p, s, pair, work, false, true);
    __syncwarp();
    if (SPLIT > 1 && IN_STAGES) cluster_sync();
    if (SPLIT * PAIR > 1) cluster_sync();
    return;
  }
  if (COPIERS == 128) take_registers<CONSUMER_REGISTERS>();
  int group = warpgroup % WARPGROUPS, share = warpgroup / WARPGROUPS;
  Consumer c{p,       s,           group, share,     thread, thread % 32, thread / 32,
             stretch, pair, s.exchange};
  int first = 0;  // stage of this tile, counted from the launch
  Sums sums;
  bool waited = false;
  while (work.next()) {
    Tile t = tile_at(p, work.index, pair);
    Factors f;
    c.load(f, t);
    if (!waited) wait_for_inputs(), waited = true;
    c.load_tokens(f, t);
    int depth = work.end - work.begin;
    c.multiply(sums, first + share, (depth - share + SHARES - 1) / SHARES);
    c.scale(sums, f);
    if (share == 0 && work.owns) c.compensate(sums, first + depth);
    if (STREAM)
      finish(c, sums, work, t, cluster, clusters);
    else if (PARTS == 1)
      c.store<BLOCKS_OF_8>(sums, t, 0);
    first += depth + (work.owns ? p.rank_steps : 0);
  }
  if (PARTS > 1 && !STREAM) {  // one tile for each cluster
    if (IN_STAGES) sync_parts();
    c.send(sums);
    sync_parts();
    int q = share * SPLIT + stretch;
    if (q < SLICES) {
      float v[TILES][SLICE * 4];
      c.receive(v, q);
      c.store<SLICE>(v, tile_at(p, cluster, pair), q * SLICE * 8);
    }
  }
  // Nobody leaves while a neighbour may still write or arrive here.
  if (PAIR > 1 && SPLIT == 1) cluster_sync();
}
