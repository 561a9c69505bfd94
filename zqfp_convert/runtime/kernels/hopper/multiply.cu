// y = W^ x^ + B z + bias: 4-bit weights become E4M3 in registers, on the way to the tensor cores.
//
// The product is made transposed, y^T = W x^T: the weights are operand A, which wgmma takes from
// registers, the activations operand B, from shared memory. One or two warps copy, WARPGROUPS others
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
// STREAM, PERSISTENT, BLOCKS (that share a multiprocessor), COPIERS (threads: 32, 64, or 128 that
// give registers away, down to COPIER_REGISTERS, so that the others have CONSUMER_REGISTERS), GROUPS
// (scales in 128 columns: 1, 2 or 4), BOOKS (see codebook.cuh), INNER_PARTS (of z, to be added up:
// 1 or 4), HALF (float16 results), LARGEST_EXCHANGE (bytes of partial sums that have room of their
// own).
#include "consume.cuh"
#include "copy.cuh"

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
  // The same in all lanes: the compiler then counts in registers that a warp has but once.
  int thread = threadIdx.x % 128, warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup >= WARPGROUPS * SHARES) {
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
    if (share == 0 && work.owns) c.compensate(sums, t, first + depth);
    if (STREAM)
      finish(c, sums, work, t, cluster, clusters);
    else if (PARTS == 1)
      c.store<BLOCKS_OF_8>(sums, t, 0);
    first += depth + (work.owns ? p.matrices[t.matrix].rank_steps : 0);
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
