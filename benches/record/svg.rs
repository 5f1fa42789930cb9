//! Charts as text: just what benches need of SVG.

// Each bench uses its own part of this.
#![allow(dead_code)]

use std::fmt::Write as _;

/// A place on the picture, from its upper left corner.
pub type Point = (f64, f64);

/// Where a text stands, seen from its point.
#[derive(Debug, Clone, Copy)]
pub enum Anchor {
    Right,
    Middle,
    Left,
}

impl Anchor {
    fn name(self) -> &'static str {
        match self {
            Anchor::Right => "start",
            Anchor::Middle => "middle",
            Anchor::Left => "end",
        }
    }
}

/// How a line is drawn.
#[derive(Debug, Clone, Copy)]
pub struct Stroke {
    pub colour: &'static str,
    pub width: f64,
    /// Of dashes, not in one.
    pub dashed: bool,
}

impl Stroke {
    /// What values are read off.
    pub const GRID: Stroke = Stroke::new("#ddd", 1.0);

    pub const fn new(colour: &'static str, width: f64) -> Stroke {
        Stroke {
            colour,
            width,
            dashed: false,
        }
    }

    pub const fn dashed(self) -> Stroke {
        Stroke {
            dashed: true,
            ..self
        }
    }

    fn attributes(self) -> String {
        let dash = if self.dashed {
            " stroke-dasharray=\"6 3\""
        } else {
            ""
        };
        format!(
            "stroke=\"{}\" stroke-width=\"{}\"{dash}",
            self.colour, self.width
        )
    }
}

/// A picture in the making.
#[derive(Debug)]
pub struct Drawing(String);

impl Drawing {
    pub fn new(width: f64, height: f64) -> Drawing {
        Drawing(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
             font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
        ))
    }

    fn add(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "{element}");
    }

    pub fn text(&mut self, (x, y): Point, anchor: Anchor, text: &str) {
        let anchor = anchor.name();
        self.add(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>"
        ));
    }

    /// Above all that belongs to it.
    pub fn heading(&mut self, (x, y): Point, text: &str) {
        self.add(format_args!(
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"15\" font-weight=\"bold\">{text}</text>"
        ));
    }

    pub fn line(&mut self, from: Point, to: Point, stroke: Stroke) {
        self.add(format_args!(
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" {}/>",
            from.0,
            from.1,
            to.0,
            to.1,
            stroke.attributes()
        ));
    }

    pub fn path(&mut self, points: impl IntoIterator<Item = Point>, stroke: Stroke) {
        let points = points.into_iter().map(|(x, y)| format!("{x:.1},{y:.1}"));
        let points: Vec<String> = points.collect();
        self.add(format_args!(
            "<polyline points=\"{}\" fill=\"none\" {}/>",
            points.join(" "),
            stroke.attributes()
        ));
    }

    pub fn bar(&mut self, (x, y): Point, (width, height): Point, colour: &str, opacity: f64) {
        self.add(format_args!(
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" \
             fill=\"{colour}\" opacity=\"{opacity}\"/>"
        ));
    }

    /// What a line means.
    pub fn key(&mut self, at: Point, stroke: Stroke, label: &str) {
        self.line((at.0, at.1), (at.0 + 30.0, at.1), stroke);
        self.text((at.0 + 36.0, at.1 + 4.0), Anchor::Right, label);
    }

    pub fn finish(mut self) -> String {
        self.0.push_str("</svg>\n");
        self.0
    }
}
