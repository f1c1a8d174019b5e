// SPDX-License-Identifier: Apache-2.0
//
// Enums between the wire and the domain, as tables: one row a value, so that both directions agree
// and a value without a row is known to be unsupported.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/pipeline/errors.h"

namespace dynsplit::rpc {

template <typename Wire, typename Domain, size_t N>
struct EnumMap {
  std::pair<Wire, Domain> rows[N];

  std::optional<Domain> ToDomain(Wire wire) const {
    for (const auto& [from, to] : rows) {
      if (from == wire) return to;
    }
    return std::nullopt;
  }
  Wire ToWire(Domain domain) const {
    for (const auto& [to, from] : rows) {
      if (from == domain) return to;
    }
    return Wire{};
  }
};

// Replaces `value` where the wire says something. A number the wire format does not define is
// INVALID_ARGUMENT, one that it defines and this server lacks UNIMPLEMENTED.
template <typename Wire, typename Domain, size_t N>
absl::Status Assign(const EnumMap<Wire, Domain, N>& map, Wire wire, bool (*is_defined)(int),
                    const std::string& field, Domain& value) {
  const int number = static_cast<int>(wire);
  if (number == 0) return absl::OkStatus();
  if (const std::optional<Domain> domain = map.ToDomain(wire); domain.has_value()) {
    value = *domain;
    return absl::OkStatus();
  }
  if (!is_defined(number)) {
    return InvalidField(field, absl::StrCat("is ", number, "; no such value is defined"));
  }
  std::string supported;
  for (const auto& row : map.rows) {
    absl::StrAppend(&supported, supported.empty() ? "" : ", ", static_cast<int>(row.first));
  }
  return WithReason(
      absl::StatusCode::kUnimplemented, "UNSUPPORTED_CHOICE",
      absl::StrCat(field, " is ", number, ", which this server does not have; it has ", supported));
}

}  // namespace dynsplit::rpc
