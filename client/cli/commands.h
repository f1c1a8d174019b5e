// SPDX-License-Identifier: Apache-2.0
//
// The subcommands. Each adds its flags to `app` and runs when parsed, leaving its exit code behind.
#pragma once

#include <CLI/CLI.hpp>

namespace dynsplit::cli {

void AddCompress(CLI::App& app, int& exit_code);
void AddPlan(CLI::App& app, int& exit_code);
void AddAdvise(CLI::App& app, int& exit_code);
void AddInspect(CLI::App& app, int& exit_code);
void AddBench(CLI::App& app, int& exit_code);
void AddServeCheck(CLI::App& app, int& exit_code);
void AddCalibrate(CLI::App& app, int& exit_code);
void AddProfile(CLI::App& app, int& exit_code);
void AddSession(CLI::App& app, int& exit_code);
void AddSessions(CLI::App& app, int& exit_code);

}  // namespace dynsplit::cli
