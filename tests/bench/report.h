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
  // What Report looks up where `peer` is empty: "kvpress-snapkv/cuda/T=131072", as
  // tests/bench/peers.py names its figures in the file that DYNSPLIT_BENCH_PEERS names. Without it,
  // the row's own name.
  std::string peer_name = {};
};

// A rate, higher is better; a cost (time, bytes), lower is better.
Row Rate(std::string name, double value, std::string unit, double ceiling, std::string target = "");
Row Cost(std::string name, double value, std::string unit, double floor, std::string target = "");

// Whether the row reaches its target; nullopt without one, or where a peer is asked for and the run
// has none. "peer >= x" compares how many times better than the peer the value is: value / peer for
// rates (units that end in "/s"), peer / value for all else. Any other text ends the program: a
// target that cannot be read is a mistake of the benchmark's.
std::optional<bool> Meets(const Row& row);

// Figure of that name in the peers' file; nullopt without the file or the name. Another unit than
// the one asked for ends the program.
std::optional<double> PeerValue(const std::string& name, const std::string& unit);

// Prints the row, and appends it to the file. The first call prints the table's head.
void Report(Row row);

}  // namespace dynsplit::bench
