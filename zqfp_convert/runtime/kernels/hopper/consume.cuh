// The warpgroups that multiply: they convert weights, feed the tensor cores, scale, compensate and
// write, or hand their sums to those that write.
#pragma once
#include "weights.cuh"
#include "wgmma.cuh"
#include "work.cuh"

DEVICE void load_words(Words &words, u32 chunk, int thread) {
  u32 lifts = chunk + CHUNK_ROWS * CHUNK_COLUMNS / 2 + thread / 4 * GROUPS * 2;
  words.half[0] = load_shared4(chunk + thread * 16);
  words.half[1] = load_shared4(chunk + 2048 + thread * 16);
  if (GROUPS == 1) words.lift = make_uint2(load_shared_half(lifts), 0);
  if (GROUPS == 2) words.lift = make_uint2(load_shared(lifts), 0);
  if (GROUPS == 4) words.lift = load_shared2(lifts);
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
    convert(w, words, p.books);
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
    const float *row_factor = p.matrices[t.matrix].row_factor;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      bool there = t.row_tiles > group * TILES + i;
      f.upper[i] = there ? row_factor[row(t, i)] : 0;
      f.lower[i] = there ? row_factor[row(t, i) + 8] : 0;
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
  DEVICE void compensate(Sums &sums, const Tile &t, int first) const {
    Step step(first);
    for (int r = 0; r < p.matrices[t.matrix].rank_steps; ++r) {
      barrier_wait(s.full(step.slot), step.parity);
      u32 outer[TILES][4];
#pragma unroll
      for (int i = 0; i < TILES; ++i) {
        uint2 v = load_shared2(s.weights(step.slot) + (group * TILES + i) * OUTER_BYTES + thread * 8);
        outer[i][0] = outer[i][2] = v.x, outer[i][1] = outer[i][3] = v.y;
      }
      wgmma_fence();
#pragma unroll
      for (int part = 0; part < INNER_PARTS; ++part)
#pragma unroll
        for (int i = 0; i < TILES; ++i)
          wgmma_bf16(sums[i], outer[i], operand_32(s.codes(step.slot) + part * INNER_BYTES));
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
    const Matrix &matrix = p.matrices[t.matrix];
    int rows = matrix.rows;
    bool aligned = rows % 8 == 0;
    u64 down = (u64)16 * rows;
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
      if (group * TILES + i >= t.row_tiles) break;
      if (matrix.bias) {
        float upper = matrix.bias[row(t, i)], lower = matrix.bias[row(t, i) + 8];
#pragma unroll
        for (int j = 0; j < COUNT; ++j) {
          v[i][j * 4] += upper, v[i][j * 4 + 1] += upper;
          v[i][j * 4 + 2] += lower, v[i][j * 4 + 3] += lower;
        }
      }
      int feature = (t.row_tile + group * TILES + i) * CHUNK_ROWS + thread % 8 * 8;
      u16 *line = matrix.y + (u64)(t.token + token + thread / 8) * rows + feature;
      int left = feature < rows ? t.tokens - token - thread / 8 : 0;
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
              write(line, out, rows - feature);
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
