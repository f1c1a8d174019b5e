// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "server/pipeline/errors.h"
#include "server/pipeline/segmentation.h"

namespace dynsplit {
namespace {

DelimiterWeight Weight(int32_t id, float weight) {
  DelimiterWeight entry;
  entry.token_id = id;
  entry.weight = weight;
  return entry;
}

TEST(DelimiterProfileTest, FindsDenseAndSparseIdsOnly) {
  constexpr int32_t kLargest = std::numeric_limits<int32_t>::max();
  const auto profile = DelimiterProfile::Create(
      "p", "text",
      {Weight(kLargest, 0.25f), Weight(7, 0.5f), Weight(1 << 20, 0.75f), Weight(0, 1)});
  ASSERT_TRUE(profile.ok());
  EXPECT_EQ(profile->name(), "p");
  EXPECT_EQ(profile->description(), "text");
  EXPECT_EQ(profile->Find(0)->weight, 1.0f);
  EXPECT_EQ(profile->Find(7)->weight, 0.5f);
  EXPECT_EQ(profile->Find(1 << 20)->weight, 0.75f);
  EXPECT_EQ(profile->Find(kLargest)->weight, 0.25f);
  for (const int32_t id :
       {1, 6, 8, (1 << 20) - 1, (1 << 20) + 1, kLargest - 1, -1, -kLargest - 1}) {
    EXPECT_EQ(profile->Find(id), nullptr) << id;
  }
  EXPECT_TRUE(std::is_sorted(
      profile->weights().begin(), profile->weights().end(),
      [](const DelimiterWeight& a, const DelimiterWeight& b) { return a.token_id < b.token_id; }));
}

TEST(DelimiterProfileTest, AnEmptyProfileHasNoDelimiters) {
  const auto profile = DelimiterProfile::Create("p", "", {});
  ASSERT_TRUE(profile.ok());
  EXPECT_EQ(profile->Find(0), nullptr);
}

TEST(DelimiterProfileTest, RefusesBadEntries) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto field = [](std::vector<DelimiterWeight> weights) {
    return GetErrorDetails(DelimiterProfile::Create("p", "", std::move(weights)).status()).subject;
  };
  EXPECT_EQ(field({Weight(1, 0), Weight(-1, 0.5f)}), "profile.weights[1].token_id");
  EXPECT_EQ(field({Weight(1, -0.1f)}), "profile.weights[0].weight");
  EXPECT_EQ(field({Weight(1, 1.1f)}), "profile.weights[0].weight");
  EXPECT_EQ(field({Weight(1, nan)}), "profile.weights[0].weight");
  EXPECT_EQ(field({Weight(1, 0), Weight(2, 0), Weight(1, 1)}), "profile.weights");
  EXPECT_EQ(field(std::vector<DelimiterWeight>(DelimiterProfile::kMaxDelimiters + 1)),
            "profile.weights");
  for (const std::string& name : {std::string(), std::string("A"), std::string("a b"),
                                  std::string("../x/"), std::string(65, 'a')}) {
    EXPECT_EQ(GetErrorDetails(DelimiterProfile::Create(name, "", {}).status()).subject,
              "profile.name")
        << name;
  }
  EXPECT_TRUE(DelimiterProfile::Create("a-b_c.9", "", {}).ok());
}

TEST(DelimiterProfileTest, ParsesColumnsInAnyOrderAndAllEscapes) {
  const auto profile = DelimiterProfile::FromCsv("p",
                                                 "# SPDX-License-Identifier: Apache-2.0\n"
                                                 "# first\n"
                                                 "#second\n"
                                                 "weight,sentence_end,token_id,note,text_escaped\n"
                                                 "0.5,1,9,x,\\x2c\\n\\t\\r\\\\\\xE2a\r\n"
                                                 "# between\n"
                                                 "\n"
                                                 "1,0,3,,  ;\n");
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->description(), "first\nsecond\nbetween");
  ASSERT_EQ(profile->weights().size(), 2u);
  EXPECT_EQ(profile->Find(9)->text,
            ",\n\t\r\\\xE2"
            "a");
  EXPECT_EQ(profile->Find(9)->weight, 0.5f);
  EXPECT_TRUE(profile->Find(9)->sentence_end);
  EXPECT_EQ(profile->Find(3)->text, "  ;");
  EXPECT_FALSE(profile->Find(3)->sentence_end);
  EXPECT_EQ(profile->Find(3)->num_occurrences, 0);
}

TEST(DelimiterProfileTest, NamesTheLineOfABrokenFile) {
  const std::string header = "token_id,text_escaped,weight,occurrences,sentence_end\n";
  const auto message = [](const std::string& csv) {
    const absl::Status status = DelimiterProfile::FromCsv("p", csv).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << csv;
    return GetErrorDetails(status).problem;
  };
  EXPECT_EQ(message(""), "has no header line");
  EXPECT_EQ(message("token_id,text_escaped\n"), "line 1: the header must name token_id and weight");
  EXPECT_EQ(message(header + "1,a,0.5,2\n"), "line 2: has 4 columns; the header has 5");
  EXPECT_EQ(message(header + "x,a,0.5,2,1\n"), "line 2: token_id is no 32-bit integer");
  EXPECT_EQ(message(header + "4294967297,a,0.5,2,1\n"), "line 2: token_id is no 32-bit integer");
  EXPECT_EQ(message(header + "1,a,,2,1\n"), "line 2: weight is no number");
  EXPECT_EQ(message(header + "1,a,0.5,z,1\n"), "line 2: occurrences is no 32-bit integer");
  EXPECT_EQ(message(header + "1,a,0.5,2,2\n"), "line 2: sentence_end is neither 0 nor 1");
  for (const char* text : {"\\", "\\q", "\\x", "\\x2", "\\x2g"}) {
    EXPECT_EQ(message(header + "1," + text + ",0.5,2,1\n"),
              "line 2: text_escaped has an unknown escape")
        << text;
  }
}

TEST(DelimiterProfileTest, BuiltinTable7HasThePapersWeights) {
  const auto found = std::find_if(
      BuiltinProfiles().begin(), BuiltinProfiles().end(),
      [](const DelimiterProfile& profile) { return profile.name() == "mistral_7b_v0_2"; });
  ASSERT_NE(found, BuiltinProfiles().end());
  EXPECT_EQ(found->weights().size(), 13u);
  const std::pair<int32_t, float> table[] = {
      {28723, 1.0f}, {609, 1.0f},   {1101, 1.0f},  {28804, 0.9f}, {28808, 0.9f},
      {28745, 0.7f}, {28747, 0.7f}, {28725, 0.6f}, {557, 0.6f},   {28742, 0.5f},
      {28732, 0.5f}, {28792, 0.5f}, {28793, 0.5f}};
  for (const auto& [id, weight] : table) {
    ASSERT_NE(found->Find(id), nullptr) << id;
    EXPECT_EQ(found->Find(id)->weight, weight) << id;
  }
  EXPECT_EQ(found->Find(28725)->text, ",");
  EXPECT_TRUE(found->Find(28723)->sentence_end);
  EXPECT_FALSE(found->Find(28732)->sentence_end);
}

TEST(DelimiterProfileTest, BuiltinsAreNamedOnceInOrder) {
  for (size_t i = 1; i < BuiltinProfiles().size(); ++i) {
    EXPECT_LT(BuiltinProfiles()[i - 1].name(), BuiltinProfiles()[i].name());
  }
}

}  // namespace
}  // namespace dynsplit
