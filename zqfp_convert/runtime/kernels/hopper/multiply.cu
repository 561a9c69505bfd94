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
// Given by the compiler's command line: TOKENS, WARPGROUPS, TILES, STAGES, SHARES, SPLIT, PAIR,
// BLOCKS (that share a multiprocessor), COPIERS (threads: 32, or 128 that give their registers away),
// GROUPS (scales in 128 columns: 1, 2 or 4), HALF (float16 results).
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
constexpr int STAGING_TOKENS = SLICE * 8 < 32 ? SLICE * 8 : 32;
constexpr int STAGING_BYTES = STAGING_TOKENS * CHUNK_ROWS * 2;  // for each warpgroup
constexpr int CONSUMERS = WARPGROUPS * SHARES * 128;
constexpr int TOKEN_TILES_TOGETHER = 8;  // that meet a stretch of weights before the next stretch
constexpr bool FEW_TOKENS = TOKENS <= 16;

static_assert(STAGES >= SHARES, "every warpgroup needs a stage");
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

struct Source {
  const Problem &p;
  const Shared &s;
  Tile t;
  int pair;

  DEVICE void expect(int slot, int token_bytes, int tile_bytes) const {
    barrier_expect(s.full(slot), t.tokens * token_bytes + t.row_tiles * tile_bytes);
  }
  // Constants, so they may be copied before the kernel ahead has ended.
  DEVICE void copy_tiles(int slot, const u8 *from, int steps, int step, int bytes) const {
    for (int i = 0; i < t.row_tiles; ++i)
      copy(s.weights(slot) + i * bytes, from + ((u64)(t.row_tile + i) * steps + step) * bytes,
           bytes, s.full(slot));
  }
  DEVICE void copy_tokens(int slot, const u8 *from, int step, int bytes) const {
    const u8 *start = from + ((u64)step * p.tokens + t.token) * bytes;
    if (PAIR == 1) {
      copy(s.codes(slot), start, t.tokens * bytes, s.full(slot));
    } else {
      constexpr int PART = TOKENS / PAIR;
      int part = min(PART, t.tokens - pair * PART);
      // The pair's ranks in the cluster: those of the same share of K.
      u16 mask = ((1 << PAIR) - 1) << (cluster_rank() / PAIR * PAIR);
      if (part > 0)
        copy_to_all(s.codes(slot) + pair * PART * bytes, start + pair * PART * bytes, part * bytes,
                    s.full(slot), mask);
    }
  }
  DEVICE void weights(int slot, int k) const {
    copy_tiles(slot, p.chunks, p.depth, k, CHUNK_BYTES);
  }
  DEVICE void codes(int slot, int k) const { copy_tokens(slot, p.codes, k, CHUNK_COLUMNS); }
};

DEVICE void produce(const Problem &p, const Shared &s, int cluster, int clusters, int pair,
                    int stretch) {
  int begin = p.depth * stretch / SPLIT, end = p.depth * (stretch + 1) / SPLIT;
  Step step(0);
  bool wrapped = false;  // the ring has been filled once, so slots have to be waited for
  bool started = false;
  for (int index = cluster; index < tile_count(p); index += clusters) {
    Source source{p, s, tile_at(p, index, pair), pair};
    int k = begin;
    if (!started) {
      int ahead = min(STAGES, end - begin);
      for (int i = 0; i < ahead; ++i) {
        source.expect(i, CHUNK_COLUMNS, CHUNK_BYTES);
        source.weights(i, begin + i);
      }
      wait_for_inputs();
      for (; k < begin + ahead; ++k) {
        source.codes(step.slot, k);
        step.next();
        wrapped |= step.slot == 0;
      }
      started = true;
    }
    for (; k < end; ++k) {
      if (wrapped) barrier_wait(s.empty(step.slot), step.parity ^ 1, PAIR > 1);
      source.expect(step.slot, CHUNK_COLUMNS, CHUNK_BYTES);
      source.weights(step.slot, k);
      source.codes(step.slot, k);
      step.next();
      wrapped |= step.slot == 0;
    }
    for (int r = 0; stretch == 0 && r < p.rank_steps; ++r) {
      if (wrapped) barrier_wait(s.empty(step.slot), step.parity ^ 1, PAIR > 1);
      source.expect(step.slot, 32, OUTER_BYTES);
      source.copy_tiles(step.slot, p.outer, p.rank_steps, r, OUTER_BYTES);
      source.copy_tokens(step.slot, p.inner, r, 32);
      step.next();
      wrapped |= step.slot == 0;
    }
  }
}

// ---- The warpgroups that multiply.

// A thread's part of a chunk, 64 x 128 weights: a wgmma of 32 columns takes four registers, of rows
// lane / 4 and lane / 4 + 8 of the warp's sixteen.
typedef u32 Weights[4][4];

DEVICE void convert(Weights &w, u32 chunk, int thread) {
  int row = thread / 4;  // counts 8 for each warp
  u32 lifts = chunk + CHUNK_ROWS * CHUNK_COLUMNS / 2 + row * GROUPS * 2;
  uint2 lift;
  if (GROUPS == 1) lift.x = load_shared_half(lifts), lift.y = 0;
  if (GROUPS == 2) lift.x = load_shared(lifts), lift.y = 0;
  if (GROUPS == 4) lift = load_shared2(lifts);
  Table upper, lower;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 words = load_shared4(chunk + half * 2048 + thread * 16);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int k = half * 2 + j;  // of four steps of 32 columns
      if (k * GROUPS % 4 == 0) {
        int group = k * GROUPS / 4;
        u32 pair = group & 2 ? lift.y : lift.x;
        pair >>= group & 1 ? 16 : 0;
        upper = table(pair & 255), lower = table(pair >> 8 & 255);
      }
      to_e4m3(j ? words.z : words.x, upper, w[k][0], w[k][2]);
      to_e4m3(j ? words.w : words.y, lower, w[k][1], w[k][3]);
    }
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

struct Factors {
  float upper[TILES], lower[TILES], token[4];
};

struct Consumer {
  const Problem &p;
  const Shared &s;
  int group, share;        // which features, which stages
  int thread, lane, warp;  // in the warpgroup
  int stretch, pair;       // of the block in its cluster

  // Multiplies a chunk of the stage. The products run on while the next chunk is converted, into
  // other registers; those of the chunk before have ended when this returns.
  DEVICE void chunk(Sums &sums, Weights &w, const Step &step, int tile) const {
    convert(w, s.weights(step.slot) + (group * TILES + tile) * CHUNK_BYTES, thread);
    u64 codes = operand_128(s.codes(step.slot));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) wgmma_e4m3(sums[tile], w[k], codes + k * 2);
    wgmma_commit();
    wgmma_wait<1>();
  }

  DEVICE void stage(Sums &sums, Weights &first, Weights &second, Step &step, int &before) const {
    barrier_wait(s.full(step.slot), step.parity, PAIR > 1);
    chunk(sums, first, step, 0);
    if (before >= 0) release(s, before, lane, stretch * PAIR);
    before = step.slot;
    if (TILES == 2) chunk(sums, second, step, TILES - 1);
    step.next(SHARES);
  }

  // The stages first, first + SHARES, ... of the ring, as many as `depth`.
  DEVICE void multiply(Sums &sums, int first, int depth) const {
    Step step(first);
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int j = 0; j < TOKENS / 2; ++j) sums[i][j] = 0;
    Weights even, odd;
    int before = -1, k = 0;
    for (; k + 1 < depth; k += 2) {
      stage(sums, even, odd, step, before);
      stage(sums, TILES == 2 ? even : odd, odd, step, before);
    }
    if (k < depth) stage(sums, even, odd, step, before);
    wgmma_wait<0>();
    if (before >= 0) release(s, before, lane, stretch * PAIR);
  }

  DEVICE void load(Factors &f, const Tile &t) const {
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      bool there = t.row_tiles > group * TILES + i;
      f.upper[i] = there ? p.row_factor[row(t, i)] : 0;
      f.lower[i] = there ? p.row_factor[row(t, i) + 8] : 0;
    }
  }

  DEVICE float token_scale(const Tile &t, int m) const {
    return m < t.tokens ? load_result(p.token_scale + t.token + m) : 0;
  }

  // Ahead of the products where registers allow: the way to memory is long.
  DEVICE void load_tokens(Factors &f, const Tile &t) const {
    if (FEW_TOKENS)
#pragma unroll
      for (int j = 0; j < BLOCKS_OF_8; ++j) {
        f.token[j * 2 & 3] = token_scale(t, j * 8 + lane % 4 * 2);
        f.token[(j * 2 + 1) & 3] = token_scale(t, j * 8 + lane % 4 * 2 + 1);
      }
  }

  // The row and token scales.
  DEVICE void scale(Sums &sums, const Factors &f, const Tile &t) const {
#pragma unroll
    for (int j = 0; j < BLOCKS_OF_8; ++j) {
      int m = j * 8 + lane % 4 * 2;
      float first = FEW_TOKENS ? f.token[j * 2 & 3] : token_scale(t, m);
      float second = FEW_TOKENS ? f.token[(j * 2 + 1) & 3] : token_scale(t, m + 1);
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
    for (int r = 0; stretch == 0 && r < p.rank_steps; ++r) {
      barrier_wait(s.full(step.slot), step.parity, PAIR > 1);
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

  // Adds the bias and writes COUNT blocks of 8 tokens from `token` of the tile on, through shared
  // memory, so that neighbouring threads write neighbouring features.
  template <int COUNT>
  DEVICE void store(float (&v)[TILES][COUNT * 4], const Tile &t, int token) const {
    constexpr int TOGETHER = COUNT < STAGING_TOKENS / 8 ? COUNT : STAGING_TOKENS / 8;
    int self = share * WARPGROUPS + group;
    u32 staging = s.staging + self * STAGING_BYTES;
    bool aligned = p.rows % 8 == 0;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (group * TILES + i >= t.row_tiles) break;
      int n = row(t, i);
      float upper = p.bias ? p.bias[n] : 0, lower = p.bias ? p.bias[n + 8] : 0;
#pragma unroll
      for (int j = 0; j < COUNT; j += TOGETHER) {
        if (token + j * 8 >= t.tokens) break;
        sync_threads(1 + self, 128);
#pragma unroll
        for (int b = 0; b < TOGETHER; ++b) {
          float *from = v[i] + (j + b) * 4;
          u32 top = pack(from[0] + upper, from[1] + upper);
          u32 bottom = pack(from[2] + lower, from[3] + lower);
          int to = b * 8 + lane % 8, piece = warp * 2 + (lane / 8 & 1);
          asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                           staging + to * 128 + ((piece ^ (to & 7)) * 16)),
                       "r"(top), "r"(bottom)
                       : "memory");
        }
        sync_threads(1 + self, 128);
#pragma unroll
        for (int e = thread; e < TOGETHER * 64; e += 128) {
          int from = e / 8, piece = e % 8;
          int m = token + j * 8 + from;
          int feature = (t.row_tile + group * TILES + i) * CHUNK_ROWS + piece * 8;
          if (m >= t.tokens || feature >= p.rows) continue;
          uint4 out = load_shared4(staging + from * 128 + ((piece ^ (from & 7)) * 16));
          u16 *to = p.y + (u64)(t.token + m) * p.rows + feature;
          if (aligned) {
            *(uint4 *)to = out;
          } else {
            u32 parts[4] = {out.x, out.y, out.z, out.w};
#pragma unroll
            for (int f = 0; f < 8; ++f)
              if (feature + f < p.rows) to[f] = (u16)(parts[f / 2] >> (f % 2 * 16));
          }
        }
      }
    }
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
    return s.exchange + ((tile * SLICE + block) * 128 + thread) * 16;
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
    sync_threads(15, CONSUMERS);
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + COPIERS, BLOCKS)
    multiply(const __grid_constant__ Problem p) {
  extern __shared__ u8 memory[];
  Shared s;
  s.stages = (shared_address(memory) + 1023) & ~1023u;
  s.staging = s.stages + STAGES * STAGE_BYTES;
  s.exchange = IN_STAGES ? s.stages : s.staging + WARPGROUPS * SHARES * STAGING_BYTES;
  s.barriers = s.staging + WARPGROUPS * SHARES * STAGING_BYTES + (IN_STAGES ? 0 : EXCHANGE_BYTES);

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

  int thread = threadIdx.x % 128, warpgroup = threadIdx.x / 128;
  if (threadIdx.x >= CONSUMERS) {
    if (COPIERS == 128) give_registers<40>();
    if (thread == 0) produce(p, s, cluster, clusters, pair, stretch);
    __syncwarp();
    if (SPLIT > 1 && IN_STAGES) cluster_sync();
    if (SPLIT * PAIR > 1) cluster_sync();
    return;
  }
  if (COPIERS == 128) take_registers<232>();
  int group = warpgroup % WARPGROUPS, share = warpgroup / WARPGROUPS;
  Consumer c{p, s, group, share, thread, thread % 32, thread / 32, stretch, pair};
  int depth = p.depth * (stretch + 1) / SPLIT - p.depth * stretch / SPLIT;
  int steps = stretch == 0 ? p.rank_steps : 0;
  int first = 0;  // stage of this tile, counted from the launch
  Sums sums;
  bool waited = false;
  for (int index = cluster; index < tile_count(p); index += clusters) {
    Tile t = tile_at(p, index, pair);
    Factors f;
    c.load(f, t);
    if (!waited) wait_for_inputs(), waited = true;
    c.load_tokens(f, t);
    c.multiply(sums, first + share, (depth - share + SHARES - 1) / SHARES);
    c.scale(sums, f, t);
    if (share == 0) c.compensate(sums, first + depth);
    if (PARTS == 1) c.store<BLOCKS_OF_8>(sums, t, 0);
    first += depth + steps;
  }
  if (PARTS > 1) {  // one tile for each cluster
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
