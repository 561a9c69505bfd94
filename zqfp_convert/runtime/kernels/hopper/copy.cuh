// The warps that copy: weights and activations, stage after stage, into the ring.
#pragma once
#include "work.cuh"

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
    const Matrix &matrix = p.matrices[t.matrix];
    tile_bytes = tile_step = CHUNK_BYTES, token_bytes = CHUNK_COLUMNS;
    start(p, matrix.chunks, p.codes, p.depth, k, k);
  }
  DEVICE void compensation(const Problem &p) {
    const Matrix &matrix = p.matrices[t.matrix];
    tile_bytes = tile_step = OUTER_BYTES, token_bytes = 32;
    start(p, matrix.outer, p.inner, matrix.rank_steps, 0, matrix.rank_step);
  }
  DEVICE void start(const Problem &p, const u8 *of_tiles, const u8 *of_tokens, int steps,
                    int tile_at, int token_at) {
    tile_apart = (u64)steps * tile_bytes;
    tiles = of_tiles + t.row_tile * tile_apart + (u64)tile_at * tile_bytes;
    token_step = (u64)p.tokens * token_bytes;
    tokens = of_tokens + token_at * token_step + (u64)t.token * token_bytes;
  }

  DEVICE void expect(int slot, int parts) const {
    barrier_expect(s.full(slot), t.tokens * token_bytes * parts + t.row_tiles * tile_bytes);
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
  // The parts of z beside the first.
  DEVICE void copy_parts(const Problem &p, int slot) {
    const u8 *from = tokens;
#pragma unroll
    for (int i = 1; i < INNER_PARTS; ++i) {
      from += p.rank_steps * token_step;
      copy(s.codes(slot) + i * INNER_BYTES, from, t.tokens * token_bytes, s.full(slot));
    }
  }
};

// Copies all stages: the thread that copies the weights also says how much there is to come.
// `tiles`, `tokens`: which part this thread copies, or both.
DEVICE void produce(const Problem &p, const Shared &s, int pair, Work work, bool tiles,
                    bool tokens) {
  Step step(0);
  bool wrapped = false;  // the ring has been filled once, so slots have to be waited for
  auto next = [&]() {
    step.next();
    wrapped |= step.slot == 0;
  };
  bool waited = !tokens;
  while (work.next()) {
    Source source(p, s, tile_at(p, work.index, pair), pair, work.begin);
    int count = work.end - work.begin;
    if (!waited) {
      int ahead = tiles ? min(STAGES, count) : 0;
      for (int i = 0; i < ahead; ++i) {
        source.expect(i, 1);
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
    for (int i = 0; i < count; ++i) {
      if (wrapped) barrier_wait(s.empty(step.slot), step.parity ^ 1);
      if (tiles) {
        source.expect(step.slot, 1);
        source.copy_tiles(step.slot);
      }
      if (tokens) source.copy_tokens(step.slot);
      next();
    }
    if (work.owns && p.matrices[source.t.matrix].rank_steps) {
      source.compensation(p);
      for (int i = 0; i < p.matrices[source.t.matrix].rank_steps; ++i) {
        if (wrapped) barrier_wait(s.empty(step.slot), step.parity ^ 1);
        if (tiles) {
          source.expect(step.slot, INNER_PARTS);
          source.copy_tiles(step.slot);
        }
        if (tokens) {
          source.copy_parts(p, step.slot);
          source.copy_tokens(step.slot);
        }
        next();
      }
    }
  }
}
