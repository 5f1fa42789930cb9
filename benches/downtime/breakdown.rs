//! The downtime by its parts, as a picture: a bar for each workload and engine.

use serde_json::Value;

use crate::Pair;
use crate::record::svg::{Anchor, Drawing, Stroke};
use crate::record::{Figures, number};

const COLOURS: [&str; 10] = [
    "#0b62a4", "#c4531a", "#2c8a3d", "#8457a8", "#b8860b", "#3aa6a6", "#b03060", "#6b8e23",
    "#5f6a72", "#d98880",
];

/// The parts of a pair's runs in their order, each with its median in milliseconds.
fn parts(pair: &Pair) -> Vec<(String, f64)> {
    let lists = || {
        pair.runs
            .iter()
            .filter_map(|run| run["breakdown"].as_array())
    };
    let Some(first) = lists().next() else {
        return Vec::new();
    };
    let names = first.iter().filter_map(|part| part["part"].as_str());
    let of = |name: &str| {
        let parts = lists().flatten().filter(|part| part["part"] == name);
        let times: Vec<f64> = parts.map(|part: &Value| number(&part["ms"])).collect();
        Figures::from(times).median
    };
    names.map(|name| (name.to_owned(), of(name))).collect()
}

/// Nothing if no engine has said what its downtime was made of.
pub fn chart(pairs: &[Pair]) -> Option<String> {
    const LEFT: f64 = 170.0;
    const WIDTH: f64 = 740.0;
    const TOP: f64 = 50.0;
    const BAR: f64 = 22.0;
    const ROW: f64 = 32.0;
    let bars: Vec<(&Pair, Vec<(String, f64)>)> = pairs
        .iter()
        .map(|pair| (pair, parts(pair)))
        .filter(|(_, parts)| !parts.is_empty())
        .collect();
    let sum = |parts: &[(String, f64)]| parts.iter().map(|part| part.1).sum::<f64>();
    let longest = bars.iter().map(|bar| sum(&bar.1)).fold(0.0, f64::max);
    if longest == 0.0 {
        return None;
    }
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in bars.iter().flat_map(|bar| &bar.1) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let colour = |name: &str| {
        let at = names.iter().position(|known| *known == name);
        COLOURS[at.unwrap_or_default() % COLOURS.len()]
    };

    let bottom = TOP + ROW * bars.len() as f64;
    let mut drawing = Drawing::new(
        1000.0,
        bottom + 60.0 + 22.0 * (names.len() as f64 / 4.0).ceil(),
    );
    drawing.heading((20.0, 28.0), "the downtime by its parts, medians, ms");
    // A step of 1, 2 or 5 with some five of them on the way.
    let rough = longest / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = steps
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    let x = |ms: f64| LEFT + WIDTH * ms / longest;
    for tick in 0..=(longest / step) as u32 {
        let ms = f64::from(tick) * step;
        drawing.line((x(ms), TOP - 6.0), (x(ms), bottom), Stroke::GRID);
        drawing.text((x(ms), bottom + 18.0), Anchor::Middle, &format!("{ms}"));
    }
    for (row, (pair, parts)) in bars.iter().enumerate() {
        let y = TOP + row as f64 * ROW;
        let label = format!("{} {}", pair.workload, pair.engine);
        drawing.text((LEFT - 10.0, y + 16.0), Anchor::Left, &label);
        let mut from = 0.0;
        for (name, ms) in parts {
            drawing.bar((x(from), y), (x(*ms) - LEFT, BAR), colour(name), 1.0);
            from += ms;
        }
        let end = (x(from) + 6.0, y + 16.0);
        drawing.text(end, Anchor::Right, &format!("{from:.0}"));
    }
    for (at, name) in names.iter().enumerate() {
        let (column, line) = ((at % 4) as f64, (at / 4) as f64);
        let corner = (LEFT + column * 190.0, bottom + 36.0 + line * 22.0);
        drawing.bar(corner, (14.0, 14.0), colour(name), 1.0);
        drawing.text((corner.0 + 20.0, corner.1 + 12.0), Anchor::Right, name);
    }
    Some(drawing.finish())
}
