// How many 4-bit weights lie together; layout.py says how.
#pragma once
#include "hardware.cuh"

// Rows and columns of a chunk: the weights that a warpgroup multiplies from one stage.
constexpr int CHUNK_ROWS = 64;
constexpr int CHUNK_COLUMNS = 128;
