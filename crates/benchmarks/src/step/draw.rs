//! A curve of measured points as SVG: transparent, in middle tones, so that it reads on a white page and on a dark one.

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (860, 460);
/// Contrast with white and with a dark page of at least 3.9 each.
const TEXT: RGBColor = RGBColor(118, 127, 138);
const LINE: RGBColor = RGBColor(47, 129, 247);

/// How a curve's points lie along their axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Axis {
    /// A step to the right adds.
    Even,
    /// A step to the right doubles.
    Doubling,
}

/// Tokens a second over something.
pub(super) struct Curve<'a> {
    pub title: &'a str,
    /// What the points are over.
    pub over: &'a str,
    pub axis: Axis,
    pub points: Vec<(f64, f64)>,
}

/// The drawing.
pub(super) fn draw(curve: &Curve<'_>) -> Result<String> {
    let mut svg = String::new();
    picture(curve, &mut svg).map_err(|error| anyhow!("the curve can't be drawn: {error}"))?;
    Ok(svg)
}

fn picture(curve: &Curve<'_>, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let place = |x: f64| match curve.axis {
        Axis::Even => x,
        Axis::Doubling => x.log2(),
    };
    let value = |place: f64| match curve.axis {
        Axis::Even => place,
        Axis::Doubling => place.exp2(),
    };
    let points: Vec<(f64, f64)> = curve.points.iter().map(|(x, y)| (place(*x), *y)).collect();
    let first = points.iter().map(|(x, _)| *x).fold(f64::INFINITY, f64::min);
    let last = points.iter().map(|(x, _)| *x).fold(f64::NEG_INFINITY, f64::max);
    // Where there is nothing to draw, the axes are drawn all the same.
    let (first, last) = if first <= last { (first, last) } else { (0.0, 1.0) };
    let edge = 0.04 * (last - first).max(1.0);
    let top = 1.12 * points.iter().map(|(_, y)| *y).fold(1e-9, f64::max);

    let area = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let font = |size: i32| ("sans-serif", size).into_font().color(&TEXT);
    let mut chart = ChartBuilder::on(&area)
        .margin(16)
        .margin_right(28)
        .caption(curve.title, font(16))
        .x_label_area_size(48)
        .y_label_area_size(76)
        .build_cartesian_2d(first - edge..last + edge, 0.0..top)?;
    let labels = match curve.axis {
        Axis::Even => 8,
        Axis::Doubling => (last - first).round() as usize + 1,
    };
    chart
        .configure_mesh()
        .disable_x_mesh()
        .bold_line_style(TEXT.mix(0.3))
        .light_line_style(TRANSPARENT)
        .axis_style(TEXT.mix(0.7))
        .x_labels(labels)
        .y_labels(8)
        .x_label_formatter(&|x| format!("{:.0}", value(*x)))
        .y_label_formatter(&|y| format!("{y:.0}"))
        .label_style(font(15))
        .axis_desc_style(font(16))
        .x_desc(curve.over)
        .y_desc("tokens/s")
        .draw()?;
    chart.draw_series(LineSeries::new(points.clone(), LINE.mix(0.6).stroke_width(2)))?;
    chart.draw_series(points.iter().map(|point| Circle::new(*point, 4, LINE.filled())))?;
    let above = font(13).pos(Pos::new(HPos::Center, VPos::Bottom));
    chart.draw_series(points.iter().map(|(x, y)| {
        let (text, style) = (format!("{y:.0}"), above.clone());
        EmptyElement::at((*x, *y)) + Text::new(text, (0, -8), style)
    }))?;
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doubling_axis_names_what_is_doubled() {
        let points = vec![(512.0, 9000.0), (1024.0, 11_000.0), (2048.0, 12_500.0)];
        let svg = draw(&Curve { title: "a model", over: "tokens", axis: Axis::Doubling, points }).unwrap();
        for text in ["512", "1024", "2048", "12500", "a model", "tokens/s"] {
            assert!(svg.contains(text), "{text}");
        }
        assert_eq!(svg.matches("<circle").count(), 3);
    }

    #[test]
    fn nothing_is_drawn_as_nothing() {
        for points in [vec![], vec![(3.0, 1.0)]] {
            let count = points.len();
            let svg = draw(&Curve { title: "", over: "x", axis: Axis::Even, points }).unwrap();
            assert_eq!(svg.matches("<circle").count(), count);
        }
    }
}
