// 4-bit weights become E4M3 by a table of eight bytes.
// BOOKS: whether there are other codebooks than E2M1.
#pragma once
#include "hardware.cuh"

// The E4M3 bytes of a codebook's magnitudes times 2^-5, of the first four and of the last four.
struct Books {
  u32 low[2], high[2];
};

// The same times 2^(lift - 5): a step of the exponent adds 8 to every byte but that of 0, which
// comes first.
struct Table {
  u32 low, high;
};

// `mark`: a group's lift, and in its highest bit which codebook the group has. E2M1 is 0, .5, 1,
// 1.5 and 2, 3, 4, 6.
DEVICE Table table(const Books &books, u32 mark) {
  if (!BOOKS) return {0x14100800u + mark * 0x08080800u, 0x24201C18u + mark * 0x08080808u};
  u32 lift = mark & 127;
  bool second = mark & 128;
  return {(second ? books.low[1] : books.low[0]) + lift * 0x08080800u,
          (second ? books.high[1] : books.high[0]) + lift * 0x08080808u};
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
