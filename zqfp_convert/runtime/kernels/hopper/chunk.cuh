// 4-bit weights: how many lie together, and how they become E4M3. layout.py says how they lie.
#pragma once
#include "hardware.cuh"

// Rows and columns of a chunk: the weights that a warpgroup multiplies from one stage.
constexpr int CHUNK_ROWS = 64;
constexpr int CHUNK_COLUMNS = 128;

// The E4M3 bytes of the magnitudes 0, .5, 1, 1.5 and 2, 3, 4, 6 times 2^(lift - 5): a step of the
// exponent adds 8 to every byte but that of 0.
struct Table {
  u32 low, high;
};

DEVICE Table table(u32 lift) {
  return {0x14100800u + lift * 0x08080800u, 0x24201C18u + lift * 0x08080808u};
}

// Eight weights of a row. `word` has the magnitudes of the first four in the low three bits of its
// nibbles 0 to 3, of the last four in nibbles 4 to 7; the signs of the first four are its bits 7,
// 15, 23 and 31, those of the last four bits 3, 11, 19 and 27.
DEVICE void to_e4m3(u32 word, Table t, u32 &first, u32 &last) {
  u32 select = word & 0x77777777u;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(first) : "r"(t.low), "r"(t.high), "r"(select));
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(last) : "r"(t.low), "r"(t.high), "r"(select >> 16));
  first |= word & 0x80808080u;
  last |= (word << 4) & 0x80808080u;
}
