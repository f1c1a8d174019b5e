// SPDX-License-Identifier: Apache-2.0
//
// UBSan only prints by default; undefined behaviour is a finding like any other. The name is the
// sanitizer's.
extern "C" const char* __ubsan_default_options();  // NOLINT(bugprone-reserved-identifier)
const char* __ubsan_default_options() {            // NOLINT(bugprone-reserved-identifier)
  return "halt_on_error=1:print_stacktrace=1";
}
