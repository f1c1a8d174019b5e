// SPDX-License-Identifier: Apache-2.0
#include "tests/bench/report.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <utility>

namespace dynsplit::bench {
namespace {

nlohmann::json OrNull(const std::optional<double>& value) {
  return value.has_value() ? nlohmann::json(*value) : nlohmann::json(nullptr);
}

std::string Text(const std::optional<double>& value, const char* format) {
  if (!value.has_value()) return "-";
  char text[32];
  std::snprintf(text, sizeof(text), format, *value);
  return text;
}

bool IsRate(const std::string& unit) { return unit.size() > 2 && unit.ends_with("/s"); }

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "%s\n", why.c_str());
  std::exit(1);
}

// What tests/bench/peers.py wrote; an empty list where no file is named.
nlohmann::json ReadPeers() {
  const char* const file = std::getenv("DYNSPLIT_BENCH_PEERS");
  if (file == nullptr) return nlohmann::json::array();
  std::ifstream in(file);
  nlohmann::json peers = nlohmann::json::parse(in, nullptr, /*allow_exceptions=*/false);
  if (!peers.is_array()) Die(std::string("DYNSPLIT_BENCH_PEERS: no list in ") + file);
  return peers;
}

}  // namespace

Row Rate(std::string name, double value, std::string unit, double ceiling, std::string target) {
  return {.name = std::move(name),
          .value = value,
          .unit = std::move(unit),
          .ceiling = ceiling,
          .share = value / ceiling,
          .target = std::move(target),
          .peer = std::nullopt};
}

Row Cost(std::string name, double value, std::string unit, double floor, std::string target) {
  return {.name = std::move(name),
          .value = value,
          .unit = std::move(unit),
          .ceiling = floor,
          .share = floor / value,
          .target = std::move(target),
          .peer = std::nullopt};
}

std::optional<bool> Meets(const Row& row) {
  if (row.target.empty()) return std::nullopt;
  std::istringstream words(row.target);
  std::string subject;
  std::string relation;
  double bound = 0;
  words >> subject >> relation >> bound;
  std::optional<double> measured;
  if (subject == "value") measured = row.value;
  if (subject == "share") measured = row.share;
  if (subject == "peer" && row.peer.has_value()) {
    measured = IsRate(row.unit) ? row.value / *row.peer : *row.peer / row.value;
  }
  if (!words || (relation != ">=" && relation != "<=") ||
      (subject != "value" && subject != "share" && subject != "peer")) {
    Die("target '" + row.target + "' of row " + row.name + " cannot be read");
  }
  if (!measured.has_value()) return std::nullopt;  // this host has no such peer
  return relation == ">=" ? *measured >= bound : *measured <= bound;
}

std::optional<double> PeerValue(const std::string& name, const std::string& unit) {
  static const nlohmann::json& peers = *new nlohmann::json(ReadPeers());
  for (const nlohmann::json& peer : peers) {
    if (peer.value("name", "") != name) continue;
    if (peer.value("unit", "") != unit) Die("peer " + name + " is not in " + unit);
    return peer.at("value").get<double>();
  }
  return std::nullopt;
}

void Report(Row row) {
  if (!row.peer.has_value()) {
    row.peer = PeerValue(row.peer_name.empty() ? row.name : row.peer_name, row.unit);
  }
  static const bool head = [] {
    std::printf("%-52s %10s %-8s %10s %7s  %-15s %4s %10s\n", "what", "value", "unit", "ceiling",
                "share", "target", "met", "peer");
    return true;
  }();
  (void)head;
  const std::optional<bool> met = Meets(row);
  const char* const met_text = !met.has_value() ? "-" : *met ? "yes" : "no";
  std::printf("%-52s %10.4g %-8s %10s %7s  %-15s %4s %10s\n", row.name.c_str(), row.value,
              row.unit.c_str(), Text(row.ceiling, "%.4g").c_str(), Text(row.share, "%.3f").c_str(),
              row.target.empty() ? "-" : row.target.c_str(), met_text,
              Text(row.peer, "%.4g").c_str());
  std::fflush(stdout);
  const char* const file = std::getenv("DYNSPLIT_BENCH_ROWS");
  if (file == nullptr) return;
  std::ofstream rows(file, std::ios::app);
  rows << nlohmann::json{{"name", row.name},
                         {"value", row.value},
                         {"unit", row.unit},
                         {"ceiling", OrNull(row.ceiling)},
                         {"share", OrNull(row.share)},
                         {"target", row.target.empty() ? nlohmann::json(nullptr)
                                                       : nlohmann::json(row.target)},
                         {"met", met.has_value() ? nlohmann::json(*met) : nlohmann::json(nullptr)},
                         {"peer", OrNull(row.peer)}}
              .dump()
       << "\n";
}

}  // namespace dynsplit::bench
