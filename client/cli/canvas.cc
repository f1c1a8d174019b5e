// SPDX-License-Identifier: Apache-2.0
#include "client/cli/canvas.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "client/cpp/file_io.h"

namespace dynsplit::cli {

Canvas::Canvas(double width, double height)
    : width_(width),
      height_(height),
      surface_(cairo_image_surface_create(CAIRO_FORMAT_RGB24,
                                          static_cast<int>(std::ceil(width * kScale)),
                                          static_cast<int>(std::ceil(height * kScale)))),
      context_(cairo_create(surface_.get())) {
  SetColor({1, 1, 1});
  cairo_paint(context_.get());
  cairo_scale(context_.get(), kScale, kScale);
}

void Canvas::SetColor(Color color) {
  cairo_set_source_rgba(context_.get(), color.red, color.green, color.blue, color.alpha);
}

void Canvas::SetFont(double size, Font font) {
  cairo_select_font_face(
      context_.get(), font == Font::kMono ? "DejaVu Sans Mono" : "DejaVu Sans",
      CAIRO_FONT_SLANT_NORMAL,
      font == Font::kSansBold ? CAIRO_FONT_WEIGHT_BOLD : CAIRO_FONT_WEIGHT_NORMAL);
  cairo_set_font_size(context_.get(), size);
}

void Canvas::Rectangle(double x, double y, double width, double height, Color color) {
  SetColor(color);
  cairo_rectangle(context_.get(), x, y, width, height);
  cairo_fill(context_.get());
}

void Canvas::Line(double x0, double y0, double x1, double y1, double width, Color color) {
  SetColor(color);
  cairo_set_line_width(context_.get(), width);
  cairo_move_to(context_.get(), x0, y0);
  cairo_line_to(context_.get(), x1, y1);
  cairo_stroke(context_.get());
}

void Canvas::Dot(double x, double y, double radius, Color color) {
  SetColor(color);
  cairo_new_sub_path(context_.get());
  cairo_arc(context_.get(), x, y, radius, 0, 2 * M_PI);
  cairo_fill(context_.get());
}

double Canvas::TextWidth(const std::string& text, double size, Font font) {
  SetFont(size, font);
  cairo_text_extents_t extents;
  cairo_text_extents(context_.get(), text.c_str(), &extents);
  return extents.x_advance;
}

void Canvas::Text(const std::string& text, double x, double y, double size, Font font, Color color,
                  Align align) {
  if (align != Align::kLeft) {
    x -= TextWidth(text, size, font) * (align == Align::kCenter ? 0.5 : 1.0);
  }
  SetFont(size, font);
  SetColor(color);
  cairo_move_to(context_.get(), x, y);
  cairo_show_text(context_.get(), text.c_str());
}

absl::Status Canvas::Save(const std::string& path) {
  if (const cairo_status_t drawn = cairo_status(context_.get()); drawn != CAIRO_STATUS_SUCCESS) {
    return absl::InternalError(
        absl::StrCat("cannot draw ", path, ": ", cairo_status_to_string(drawn)));
  }
  auto file = AtomicFile::Create(path);
  if (!file.ok()) return file.status();
  struct Sink {
    AtomicFile* file;
    absl::Status status;
  } sink = {file->get(), absl::OkStatus()};
  const auto write = [](void* closure, const unsigned char* data, unsigned int size) {
    auto* to = static_cast<Sink*>(closure);
    to->status = to->file->Write(data, size);
    return to->status.ok() ? CAIRO_STATUS_SUCCESS : CAIRO_STATUS_WRITE_ERROR;
  };
  const cairo_status_t saved = cairo_surface_write_to_png_stream(surface_.get(), write, &sink);
  if (!sink.status.ok()) return sink.status;
  if (saved != CAIRO_STATUS_SUCCESS) {
    return absl::InternalError(
        absl::StrCat("cannot save ", path, ": ", cairo_status_to_string(saved)));
  }
  return (*file)->Commit();
}

}  // namespace dynsplit::cli
