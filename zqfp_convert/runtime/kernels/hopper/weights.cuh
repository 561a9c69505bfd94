// A chunk as the tensor cores take it: in the registers of a warpgroup. GROUPS: scales in 128 columns.
#pragma once
#include "chunk.cuh"
#include "codebook.cuh"

// A thread's part of a chunk, 64 x 128 weights: a wgmma of 32 columns takes four registers, of rows
// lane / 4 and lane / 4 + 8 of the warp's sixteen.
typedef u32 Weights[4][4];

// The same, as it lies in memory.
struct Words {
  uint4 half[2];
  uint2 lift;
};

DEVICE void convert(Weights &w, const Words &words, const Books &books) {
  Table upper, lower;
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // steps of 32 columns
    if (k * GROUPS % 4 == 0) {
      int group = k * GROUPS / 4;
      u32 pair = (group & 2 ? words.lift.y : words.lift.x) >> (group & 1 ? 16 : 0);
      upper = table(books, pair & 255), lower = table(books, pair >> 8 & 255);
    }
    uint4 half = words.half[k / 2];
    to_e4m3(k % 2 ? half.z : half.x, upper, w[k][0], w[k][2]);
    to_e4m3(k % 2 ? half.w : half.y, lower, w[k][1], w[k][3]);
  }
}
