// Does nothing for a while, after the kernel ahead: as whatever a model has between two products.
// `tuning.py` measures with it, since what a product reads meanwhile costs no time.
#include "hardware.cuh"

struct Problem {
  long long cycles;
};

extern "C" __global__ void pause(const __grid_constant__ Problem p) {
  launch_dependents();
  wait_for_inputs();
  long long begin = clock64();
  while (clock64() - begin < p.cycles) {
  }
}
