// SPDX-License-Identifier: Apache-2.0
//
// What every benchmark says of a measurement, and the one place it is written: a line of the table
// on stdout, and, where DYNSPLIT_BENCH_ROWS names a file, a line of JSON appended to it, which
// `./run bench` joins to build/bench/summary.json.
#pragma once

#include <optional>
#include <string>

namespace dynsplit::bench {

// A value beside the ceiling of the same run. The share is how much of the ceiling is reached, 1 =
// all of it: value / ceiling for rates, ceiling / value for times.
struct Row {
  std::string name;  // "cuda/gather/keep=0.2"; unique in a run
  double value = 0;
  std::string unit;  // of value and ceiling: "GB/s", "ms", "us", "Gflop/s", "bytes"
  std::optional<double> ceiling;
  std::optional<double> share;  // as Rate and Cost fill it
  std::string target;           // "share >= 0.90", "value <= 120", "peer >= 25"; empty = none
  std::optional<double> peer;   // value of the peer in the same unit and run
};

// A rate, higher is better; a cost (time, bytes), lower is better.
Row Rate(std::string name, double value, std::string unit, double ceiling, std::string target = "");
Row Cost(std::string name, double value, std::string unit, double floor, std::string target = "");

// Whether the row reaches its target; nullopt without one. "peer >= x" compares how many times
// better than the peer the value is: peer / value where the ceiling is a floor or absent. Any other
// text ends the program: a target that cannot be read is a mistake of the benchmark's.
std::optional<bool> Meets(const Row& row);

// Prints the row, and appends it to the file. The first call prints the table's head.
void Report(const Row& row);

}  // namespace dynsplit::bench
