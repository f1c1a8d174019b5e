// SPDX-License-Identifier: Apache-2.0
//
// Flags that several commands share, and what they stand for.
#pragma once

#include <google/protobuf/generated_enum_reflection.h>
#include <CLI/CLI.hpp>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_replace.h"
#include "client/cpp/client.h"
#include "dynsplit/v1/types.pb.h"

namespace dynsplit::cli {

// An option whose choices are an enum's values: METHOD_DELIMITER_SET is "delimiter-set".
template <typename Enum>
CLI::Option* AddEnum(CLI::App& app, const std::string& name, const std::string& description,
                     std::function<void(Enum)> set) {
  const google::protobuf::EnumDescriptor* type = google::protobuf::GetEnumDescriptor<Enum>();
  constexpr size_t kUnspecifiedLength = sizeof("UNSPECIFIED") - 1;
  const size_t prefix = type->value(0)->name().size() - kUnspecifiedLength;
  std::map<std::string, Enum> values;
  std::vector<std::string> names;
  for (int i = 1; i < type->value_count(); ++i) {
    std::string choice = absl::AsciiStrToLower(type->value(i)->name().substr(prefix));
    choice = absl::StrReplaceAll(choice, {{"_", "-"}});
    values[choice] = static_cast<Enum>(type->value(i)->number());
    names.push_back(choice);
  }
  return app
      .add_option_function<std::string>(
          name, [values, set](const std::string& choice) { set(values.at(choice)); }, description)
      ->check(CLI::IsMember(names))
      ->group("Policy");
}

// How to reach the server.
struct ConnectionFlags {
  std::string target = "127.0.0.1:8001";
  double timeout_seconds = 300;
  int chunk_kib = 2048;
  int num_channels = 1;

  void AddTo(CLI::App& app);
  absl::StatusOr<std::unique_ptr<Client>> Connect() const;
};

// Every choice of a policy; what is not given is the preset's or the server's default.
class PolicyFlags {
 public:
  PolicyFlags() = default;
  PolicyFlags(const PolicyFlags&) = delete;  // options write through references to policy_
  PolicyFlags& operator=(const PolicyFlags&) = delete;

  void AddTo(CLI::App& app);
  // Only what was given is present.
  v1::Policy Get() const;

 private:
  v1::Policy policy_;
};

// A request made from a capture file.
struct CaptureFlags {
  std::string input;
  std::vector<int32_t> layers;  // of the capture; empty = all
  int32_t num_window_queries = 0;

  void AddTo(CLI::App& app);
  // The file and its layers only.
  void AddInputTo(CLI::App& app);
};

}  // namespace dynsplit::cli
