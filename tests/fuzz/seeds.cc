// SPDX-License-Identifier: Apache-2.0
//
// Writes a small seed corpus for each fuzzer: fuzz_seeds FOLDER.
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "client/cpp/container.h"
#include "client/cpp/safetensors.h"
#include "dynsplit/v1/compression.pb.h"
#include "dynsplit/v1/sessions.pb.h"
#include "proto/wire/crc32c.h"
#include "server/runtime/config.h"
#include "tests/fuzz/begin_seeds.h"

namespace {

using dynsplit::ContainerSection;
using dynsplit::SafetensorsTensor;
namespace v1 = dynsplit::v1;

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

void WriteFrames(const std::string& folder) {
  v1::CompressRequest chunk;
  chunk.set_tensor(300);
  chunk.set_offset(1 << 20);
  chunk.set_data("some bytes of a tensor");
  chunk.set_crc32c(dynsplit::wire::Crc32c(chunk.data().data(), chunk.data().size()));
  chunk.set_last(true);
  chunk.set_tensor_crc32c(chunk.crc32c());
  v1::CompressRequest begin;
  begin.mutable_begin()->set_request_id("seed");
  begin.mutable_begin()->mutable_shape()->set_num_tokens(7);
  begin.mutable_begin()->add_tensors()->set_byte_size(9);
  v1::CompressResponse layer;
  layer.mutable_layer()->mutable_plan()->set_num_kept_tokens(5);
  int number = 0;
  for (const std::string& bytes :
       {chunk.SerializeAsString(), begin.SerializeAsString(), layer.SerializeAsString(),
        std::string("\x53\x50\x01\x54", 4) + chunk.SerializeAsString()}) {
    for (const char slices : {'\x00', '\x04', '\xFF'}) {
      Write(folder + "/" + std::to_string(number++), slices + bytes);
    }
  }
}

absl::Span<const std::byte> AsBytes(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

absl::Status WriteContainers(const std::string& folder) {
  v1::ContainerHeader header;
  header.mutable_shape()->set_num_tokens(3);
  header.set_representation_salt("salt");
  if (auto status = dynsplit::WriteContainer(folder + "/empty", header, {}); !status.ok())
    return status;
  std::vector<ContainerSection> sections(2);
  const std::string bytes(100, 'k');
  for (ContainerSection& section : sections) {
    section.descriptor.set_kind(v1::TENSOR_KIND_KEY_PAGES);
    section.descriptor.set_layer(1);
    section.descriptor.set_byte_size(100);
    section.bytes = AsBytes(bytes);
  }
  return dynsplit::WriteContainer(folder + "/two", header, sections);
}

// A whole capture of two tokens, one layer and one head of dimension 1.
absl::Status WriteCaptures(const std::string& folder) {
  const std::string zeros(16, '\0');
  const std::string offsets("\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x00", 12);
  const std::string position("\x01\x00\x00\x00", 4);
  const std::vector<SafetensorsTensor> tensors = {
      {"token_ids", "I32", {2}, AsBytes(zeros).first(8)},
      {"token_bytes", "U8", {2}, AsBytes(zeros).first(2)},
      {"token_offsets", "I32", {3}, AsBytes(offsets)},
      {"query_positions", "I32", {1}, AsBytes(position)},
      {"layers.0.key", "BF16", {2, 1, 1}, AsBytes(zeros).first(4)},
      {"layers.0.value", "BF16", {2, 1, 1}, AsBytes(zeros).first(4)},
      {"layers.0.query", "BF16", {1, 1, 1}, AsBytes(zeros).first(2)}};
  const std::map<std::string, std::string> metadata = {
      {"dynsplit.format", "kv-capture/1"},
      {"dynsplit.model",
       R"({"name":"m","layer_ids":[3],"num_query_heads":1,"num_kv_heads":1,"head_dim":1,)"
       R"("rope":{"theta":1e4,"rotary_dim":0,"interleaved":false},"vocab_size":9})"},
      {"dynsplit.text", R"({"kind":"prose"})"}};
  if (auto status = dynsplit::WriteSafetensors(folder + "/capture", metadata, tensors);
      !status.ok()) {
    return status;
  }
  Write(folder + "/header",
        std::string(R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}})") +
            std::string("\x03\x00", 2));
  return dynsplit::WriteSafetensors(folder + "/empty", {}, {});
}

absl::Status WriteBegins(const std::string& folder) {
  const auto seeds = dynsplit::BeginSeeds();
  if (!seeds.ok()) return seeds.status();
  for (const dynsplit::BeginSeed& seed : *seeds) {
    Write(folder + "/" + seed.name,
          static_cast<char>(seed.method) + seed.begin.SerializeAsString());
  }
  v1::Begin later;  // none that begins a request
  later.set_request_id("seed");
  later.set_tenant("seeds");
  later.set_shard_index(3);
  later.set_num_shards(4);
  Write(folder + "/later_shard",
        static_cast<char>(dynsplit::Method::kCompress) + later.SerializeAsString());
  return absl::OkStatus();
}

void WriteSelects(const std::string& folder) {
  v1::SelectRequest request;
  v1::SequenceStep& step = *request.add_sequences();
  step.set_session_id("s-1");
  step.set_first_layer(1);
  step.set_num_queries(2);
  step.set_dtype(v1::DTYPE_BFLOAT16);
  step.set_query_data(std::string(64, 'q'));
  Write(folder + "/inline", request.SerializeAsString());
  v1::SequenceStep& other = *request.add_sequences();
  other = step;
  other.set_session_id("s-2");
  other.set_with_pages(true);
  other.mutable_query_region()->set_name("queries");
  other.mutable_gather()->set_generation(7);
  other.mutable_gather()->mutable_key_region()->set_name("rows");
  other.mutable_gather()->mutable_value_region()->set_offset_bytes(4096);
  Write(folder + "/regions", request.SerializeAsString());
}

// The leading byte tells profiles (even) from configurations (odd).
void WriteProfiles(const std::string& folder) {
  Write(folder + "/profile", std::string(1, '\0') +
                                 "# a comment\n"
                                 "token_id,text_escaped,weight,occurrences,sentence_end\n"
                                 "28725,\\x2c,0.6,,0\r\n"
                                 "30,.\\n,1.0,12,1\n"
                                 "2147483647,\\\\,1e-3,0,true\n");
  Write(folder + "/least", std::string(1, '\0') + "weight,token_id\n1,0\n");
  std::string config(1, '\1');
  for (const dynsplit::ConfigOption& option : dynsplit::ConfigOptions()) {
    config += std::string(option.name) + " = " + option.get({}) + "\n";
  }
  Write(folder + "/defaults", config);
  Write(folder + "/units",
        "\1# a comment\nqueue-timeout=250ms # another\nmax-request-bytes = 512MiB\n"
        "drain-timeout = 1.5\nreflection = no\n");
}

// Steps as passed_file_fuzzer.cc reads them: what a packet attaches, and its token.
void WritePackets(const std::string& folder) {
  const auto packet = [](char num_files, char choices, const std::string& token) {
    return std::string({'\0', num_files, choices, static_cast<char>(token.size())}) + token;
  };
  const std::string token(16, 't');
  const std::string find("\1\0", 2);
  const std::string remove("\2\0", 2);
  const std::string sealed = packet(1, 0, token);
  Write(folder + "/taken", sealed + find + remove + find);
  Write(folder + "/late", sealed + find + "\3\x1e" + find + sealed);
  Write(folder + "/twice", sealed + sealed);
  Write(folder + "/full", sealed + packet(1, 0, std::string(16, 'u')) +
                              packet(1, 0, std::string(16, 'v')) +
                              packet(1, 0, std::string(16, 'w')));
  Write(folder + "/wrong", packet(1, 1, token) + packet(1, 2, token) + packet(1, 3, token) +
                               packet(2, 0, token) + packet(4, 0, token) + packet(0, 0, token) +
                               packet(0, 0, "") + packet(1, 0, "") + packet(1, 0, token + "t"));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "usage: fuzz_seeds FOLDER\n";
    return 2;
  }
  const std::string folder = argv[1];
  for (const char* name :
       {"frame", "container", "safetensors", "begin", "profile", "select", "passed_file"}) {
    std::filesystem::create_directories(folder + "/" + name);
  }
  WriteFrames(folder + "/frame");
  absl::Status status = WriteContainers(folder + "/container");
  status.Update(WriteCaptures(folder + "/safetensors"));
  status.Update(WriteBegins(folder + "/begin"));
  WriteProfiles(folder + "/profile");
  WriteSelects(folder + "/select");
  WritePackets(folder + "/passed_file");
  if (status.ok()) return 0;
  std::cerr << status << "\n";
  return 1;
}
