// SPDX-License-Identifier: Apache-2.0
//
// A page to draw on, saved as PNG. Lengths are in points of the page; the image is kScale times as
// large.
#pragma once

#include <cairo/cairo.h>

#include <memory>
#include <string>

#include "absl/status/status.h"

namespace dynsplit::cli {

struct Color {
  double red, green, blue, alpha = 1;
};

inline constexpr Color kInk = {0.10, 0.13, 0.18};
inline constexpr Color kMutedInk = {0.38, 0.43, 0.50};
inline constexpr Color kFaintInk = {0.66, 0.70, 0.75};
inline constexpr Color kRule = {0.88, 0.90, 0.92};
inline constexpr Color kBlue = {0.16, 0.42, 0.74};
inline constexpr Color kPaleBlue = {0.66, 0.78, 0.92};
inline constexpr Color kOrange = {0.85, 0.42, 0.06};

enum class Font { kMono, kSans, kSansBold };
enum class Align { kLeft, kCenter, kRight };

class Canvas {
 public:
  static constexpr double kScale = 1.5;

  Canvas(double width, double height);

  double width() const { return width_; }
  double height() const { return height_; }

  void Rectangle(double x, double y, double width, double height, Color color);
  void Line(double x0, double y0, double x1, double y1, double width, Color color);
  void Dot(double x, double y, double radius, Color color);
  // `y` is the baseline. UTF-8; what is not is left out.
  void Text(const std::string& text, double x, double y, double size, Font font, Color color,
            Align align = Align::kLeft);
  double TextWidth(const std::string& text, double size, Font font);

  // Replaces `path` atomically.
  absl::Status Save(const std::string& path);

 private:
  struct Destroy {
    void operator()(cairo_surface_t* surface) const { cairo_surface_destroy(surface); }
    void operator()(cairo_t* context) const { cairo_destroy(context); }
  };

  void SetFont(double size, Font font);
  void SetColor(Color color);

  const double width_, height_;
  std::unique_ptr<cairo_surface_t, Destroy> surface_;
  std::unique_ptr<cairo_t, Destroy> context_;
};

}  // namespace dynsplit::cli
