//! The downtime against the container's memory: with rounds of memory it is that of what is written to, which
//! here is the same amount in every size.

use serde_json::Value;

use super::record::svg::{Anchor, Drawing, Stroke};
use super::record::{self, number};

/// Without rounds, and with them.
pub const ENGINES: [&str; 2] = ["direct", "precopy"];
pub const RUNTIME: &str = "runc";
const COLOURS: [&str; 2] = ["#c4531a", "#0b62a4"];

/// Says and draws how the downtime grows.
///
/// # Panics
/// If it grows half as fast with rounds as it does without, or faster.
pub fn judge(cells: &[Value]) {
    let lines = ENGINES.map(|engine| points(cells, engine));
    if lines.iter().any(|line| line.len() < 2) {
        // Not among those that were chosen.
        return;
    }
    for (engine, line) in ENGINES.iter().zip(&lines) {
        let line: Vec<String> = line
            .iter()
            .map(|(mib, ms)| format!("{mib} MiB {ms:.0} ms"))
            .collect();
        println!("downtime with {engine}: {}", line.join(", "));
    }
    let [without, with] = lines.each_ref().map(|line| growth(line));
    println!("it grows by {without:.0} ms without rounds, and by {with:.0} ms with them");
    record::write("vm-growth.svg", &chart(&lines));
    assert!(
        with < without / 2.0,
        "{with} ms with rounds, {without} without"
    );
}

/// Memory in MiB and the downtime in milliseconds, by memory.
fn points(cells: &[Value], engine: &str) -> Vec<(u64, f64)> {
    let is = |cell: &&Value| {
        cell["engine"] == engine
            && cell["workload"]
                .as_str()
                .is_some_and(|name| name.ends_with("-steady"))
    };
    let point = |cell: &Value| Some((cell["mib"].as_u64()?, number(&cell["downtime_ms"])));
    let mut points: Vec<_> = cells.iter().filter(is).filter_map(point).collect();
    points.sort_by_key(|(mib, _)| *mib);
    points
}

fn growth(line: &[(u64, f64)]) -> f64 {
    match (line.first(), line.last()) {
        (Some((_, least)), Some((_, most))) => most - least,
        _ => 0.0,
    }
}

fn chart(lines: &[Vec<(u64, f64)>; 2]) -> String {
    const WIDTH: f64 = 560.0;
    const HEIGHT: f64 = 260.0;
    const LEFT: f64 = 80.0;
    const TOP: f64 = 50.0;
    let bottom = TOP + HEIGHT;
    let all = || lines.iter().flatten();
    let widest = all().map(|(mib, _)| *mib).max().unwrap_or(1) as f64;
    let longest = all().map(|(_, ms)| *ms).fold(1.0, f64::max);
    let x = |mib: u64| LEFT + WIDTH * mib as f64 / widest;
    let y = |ms: f64| bottom - HEIGHT * ms / longest;
    let mut drawing = Drawing::new(700.0, 400.0);
    drawing.heading(
        (LEFT, TOP - 14.0),
        "downtime against memory, 1.28 MiB of it written to per second, ms",
    );
    for quarter in 0..=4 {
        let ms = longest * f64::from(quarter) / 4.0;
        drawing.line((LEFT, y(ms)), (LEFT + WIDTH, y(ms)), Stroke::GRID);
        drawing.text((LEFT - 8.0, y(ms) + 4.0), Anchor::Left, &format!("{ms:.0}"));
    }
    for (mib, _) in &lines[0] {
        let label = format!("{mib} MiB");
        drawing.text((x(*mib), bottom + 18.0), Anchor::Middle, &label);
    }
    for (at, (line, engine)) in lines.iter().zip(ENGINES).enumerate() {
        let stroke = || Stroke::new(COLOURS[at], 2.0);
        drawing.path(line.iter().map(|(mib, ms)| (x(*mib), y(*ms))), stroke());
        let corner = (LEFT + 200.0 * at as f64, bottom + 50.0);
        drawing.key(corner, stroke(), engine);
    }
    drawing.finish()
}
