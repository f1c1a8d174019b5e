// SPDX-License-Identifier: Apache-2.0
#include <iostream>
#include <memory>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/cli/commands.h"
#include "client/cli/console.h"
#include "client/cli/report.h"
#include "client/cli/request.h"
#include "client/cpp/container.h"
#include "client/cpp/file_io.h"
#include "client/cpp/safetensors.h"

namespace dynsplit::cli {
namespace {

struct Flags {
  std::string input;
  bool json = false;
};

void PrintContainer(const Container& container) {
  const v1::ContainerHeader& header = container.header();
  const v1::SequenceShape& shape = header.shape();
  std::cout << "container, version 1, " << HumanBytes(static_cast<double>(container.file_bytes()))
            << ", all checksums right\n";
  for (const auto& [key, value] : header.metadata()) {
    if (!value.empty()) std::cout << absl::StrFormat("%-11s %s\n", key, value);
  }
  std::cout << absl::StrFormat("%-11s %d layers, %d query and %d KV heads, %s tokens, dim %d\n",
                               "shape", shape.num_layers(), shape.num_query_heads(),
                               shape.num_kv_heads(), HumanCount(shape.num_tokens()),
                               shape.head_dim());
  std::cout << absl::StrFormat("%-11s %s\n", "policy", DescribePolicy(header.plan().policy()));
  std::cout << absl::StrFormat("%-11s %s\n", "plan", header.plan().hash());
  std::cout << absl::StrFormat("%-11s %s\n", "salt", header.representation_salt());
  std::cout << absl::StrFormat("%-11s %s -> %s\n\n", "bytes",
                               HumanBytes(static_cast<double>(header.bytes_in())),
                               HumanBytes(static_cast<double>(header.bytes_out())));
  if (header.plan().layers_size() > 0) {
    std::cout << HumanReport(header.plan(), header.receipt()) << "\n";
  }
  std::vector<std::vector<std::string>> rows = {
      {"tensor", "layer", "dtype", "shape", "bytes", "offset", "crc32c"}};
  for (const v1::ContainerTensor& entry : header.tensors()) {
    const v1::TensorDescriptor& tensor = entry.tensor();
    rows.push_back(
        {KindLabel(tensor.kind()), tensor.has_layer() ? absl::StrCat(tensor.layer()) : "-",
         DTypeLabel(tensor.dtype()), absl::StrJoin(OutputShape(tensor, header.plan()), "×"),
         HumanBytes(static_cast<double>(tensor.byte_size())), absl::StrCat(entry.offset_bytes()),
         absl::StrFormat("%08x", entry.crc32c())});
  }
  std::cout << Table(rows);
}

void PrintSafetensors(const Safetensors& file) {
  std::cout << "safetensors, " << file.tensors().size() << " tensors\n";
  for (const auto& [key, value] : file.metadata()) {
    std::cout << absl::StrFormat("%-20s %s\n", key, value);
  }
  std::vector<std::vector<std::string>> rows = {{"tensor", "dtype", "shape", "bytes"}};
  for (const SafetensorsTensor& tensor : file.tensors()) {
    rows.push_back({tensor.name, tensor.dtype, absl::StrJoin(tensor.shape, "×"),
                    HumanBytes(static_cast<double>(tensor.bytes.size()))});
  }
  std::cout << "\n" << Table(rows);
}

nlohmann::json SafetensorsJson(const Safetensors& file) {
  nlohmann::json tensors = nlohmann::json::array();
  for (const SafetensorsTensor& tensor : file.tensors()) {
    tensors.push_back({{"name", tensor.name},
                       {"dtype", tensor.dtype},
                       {"shape", tensor.shape},
                       {"bytes", tensor.bytes.size()}});
  }
  return {{"format", "safetensors"}, {"metadata", file.metadata()}, {"tensors", tensors}};
}

int InspectContainer(const Flags& flags) {
  const absl::StatusOr<Container> container = Container::Load(flags.input);
  if (!container.ok()) return PrintError(container.status());
  if (absl::Status status = container->VerifySections(); !status.ok()) return PrintError(status);
  if (flags.json) {
    nlohmann::json json = ToJson(container->header());
    json["format"] = "container";
    json["file_bytes"] = container->file_bytes();
    std::cout << json.dump(2) << "\n";
  } else {
    PrintContainer(*container);
  }
  return kExitOk;
}

int InspectSafetensors(const Flags& flags) {
  const absl::StatusOr<Safetensors> file = Safetensors::Load(flags.input);
  if (!file.ok()) return PrintError(file.status());
  if (flags.json) {
    std::cout << SafetensorsJson(*file).dump(2, ' ', false,
                                             nlohmann::json::error_handler_t::replace)
              << "\n";
  } else {
    PrintSafetensors(*file);
  }
  return kExitOk;
}

int Run(const Flags& flags) {
  const auto file = MappedFile::Open(flags.input);
  if (!file.ok()) return PrintError(file.status());
  const absl::Span<const std::byte> bytes = (*file)->bytes();
  // A safetensors file begins with a length whose ninth byte is the header's brace.
  const bool safetensors = bytes.size() > 8 && bytes[8] == std::byte{'{'};
  return safetensors ? InspectSafetensors(flags) : InspectContainer(flags);
}

}  // namespace

void AddInspect(CLI::App& app, int& exit_code) {
  CLI::App& command = *app.add_subcommand(
      "inspect", "Show a container or safetensors file and verify its checksums");
  auto flags = std::make_shared<Flags>();
  command.add_option("input", flags->input, "File")->required()->check(CLI::ExistingFile);
  command.add_flag("--json", flags->json, "Machine-readable answer on stdout");
  command.callback([flags, &exit_code] { exit_code = Run(*flags); });
}

}  // namespace dynsplit::cli
