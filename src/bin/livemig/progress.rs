//! How a migration looks while it runs: a display that moves on a terminal, plain lines elsewhere,
//! one JSON object a line for programs.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use livemig::conntrack::hold::HoldReport;
use livemig::migration::{Cargo, Event, Observer, Round};
use livemig::{Error, Report};

use crate::exit;

/// Renders the events of one migration.
pub struct Progress {
    output: Output,
    /// What is being sent, and since when.
    sending: Option<(Cargo, Instant)>,
}

/// Where the events go.
enum Output {
    /// On a terminal: a line that is written over.
    Terminal { bar: ProgressBar },
    /// Into a file or a pipe: a line an event.
    Lines { last: Instant },
    /// For a program: an object a line.
    Json,
}

impl Progress {
    /// The way that suits where the output goes.
    pub fn new(json: bool) -> Progress {
        let output = if json {
            Output::Json
        } else if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            Output::Terminal { bar }
        } else {
            Output::Lines {
                last: Instant::now(),
            }
        };
        Progress {
            output,
            sending: None,
        }
    }

    fn line(&self, text: &str) {
        match &self.output {
            Output::Terminal { bar } => bar.println(text),
            Output::Lines { .. } | Output::Json => say(std::io::stderr(), text),
        }
    }
}

/// How far it is, and how fast it goes.
fn sending(what: Cargo, bytes: u64, total: Option<u64>, took: Duration) -> String {
    let what = match what {
        Cargo::Image => "image",
        Cargo::Memory => "memory",
        Cargo::Files => "files",
        Cargo::Container => "container",
    };
    let mut text = format!("sending the {what}: {}", Bytes(bytes));
    if let Some(total) = total {
        text.push_str(&format!(" of {}", Bytes(total)));
    }
    // Before that a rate is chance.
    if took >= Duration::from_millis(500) {
        let rate = bytes as f64 / took.as_secs_f64();
        text.push_str(&format!(", {}/s", Bytes(rate as u64)));
    }
    text
}

/// Writes a line. `println!` would panic when nobody reads any more (`| head`, a lost terminal), and
/// leave the container frozen.
fn say(mut to: impl Write, line: &str) {
    let _ = writeln!(to, "{line}");
}

impl Observer for Progress {
    fn observe(&mut self, event: Event) {
        if matches!(self.output, Output::Json) {
            if let Ok(line) = serde_json::to_string(&event) {
                say(std::io::stdout(), &line);
            }
            return;
        }
        match event {
            Event::Started { phase } => {
                if let Output::Terminal { bar } = &self.output {
                    bar.set_message(format!("{phase} …"));
                }
            }
            Event::Finished { phase, took } => {
                self.line(&format!(
                    "{phase:<10} {:>10.1} ms",
                    took.as_secs_f64() * 1e3
                ));
            }
            Event::Sent { what, bytes, total } => {
                let since = match self.sending {
                    Some((same, since)) if same == what => since,
                    _ => Instant::now(),
                };
                self.sending = Some((what, since));
                let text = sending(what, bytes, total, since.elapsed());
                match &mut self.output {
                    Output::Terminal { bar } => bar.set_message(text),
                    // A line a second is enough for a log.
                    Output::Lines { last } if last.elapsed().as_secs() >= 1 => {
                        *last = Instant::now();
                        say(std::io::stderr(), &text);
                    }
                    _ => {}
                }
            }
            Event::Copied { round } => self.line(&copied(&round)),
            Event::Warning { finding } => {
                self.line(&format!("warning: {} ({})", finding.what, finding.code))
            }
            Event::RollingBack { cause } => {
                self.line(&format!("undoing everything, because: {cause}"))
            }
            Event::Undone {
                effect,
                failure: Some(failure),
            } => self.line(&format!("cannot undo: {effect}: {failure}")),
            Event::Undone {
                effect,
                failure: None,
            } => self.line(&format!("undone: {effect}")),
            _ => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Output::Terminal { bar } = &self.output {
            bar.finish_and_clear();
        }
    }
}

/// A number of bytes for people, in powers of 1024.
pub struct Bytes(pub u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        if unit == 0 {
            write!(f, "{} B", self.0)
        } else {
            write!(f, "{value:.1} {}", UNITS[unit])
        }
    }
}

/// Says in a few lines what came of it.
pub fn summary(report: &Report) {
    println!(
        "{} runs on {} now: {:.0} ms without service, {} kept, {} sent, {:.1} s in all",
        report.name,
        report.destination,
        report.downtime.as_secs_f64() * 1e3,
        match report.flows.len() {
            1 => "1 connection".to_owned(),
            many => format!("{many} connections"),
        },
        Bytes(report.bytes_sent),
        report.total.as_secs_f64(),
    );
    if let Some(unread) = report.unread.filter(|unread| *unread > report.downtime) {
        println!(
            "it ran while its memory was being fetched, and read nothing for {:.0} ms once",
            unread.as_secs_f64() * 1e3
        );
    }
    if report.held.held > 0 {
        println!("{}", waited(&report.held));
    }
    for path in &report.paths {
        match &path.kept {
            None => println!(
                "{} of them, from {}, do not come through this host any more",
                path.flows, path.anchor
            ),
            Some(reason) => println!(
                "{} of them, from {}, go on through this host: {reason}",
                path.flows, path.anchor
            ),
        }
    }
    for left in &report.drain.left {
        println!("not read in time before it was frozen, and lost: {left}");
    }
    for leftover in &report.leftovers {
        println!("could not be tidied here: {leftover}");
    }
}

/// One round of memory.
fn copied(round: &Round) -> String {
    let mut text = format!(
        "{} of memory copied in {:.1} ms",
        Bytes(round.bytes),
        round.took.as_secs_f64() * 1e3
    );
    if let Some(frozen) = round.frozen {
        text.push_str(&format!(
            ", for {:.1} of which it stood still",
            frozen.as_secs_f64() * 1e3
        ));
    }
    text
}

/// What became of the packets that waited.
fn waited(held: &HoldReport) -> String {
    let mut text = format!(
        "{} waited meanwhile, {} at most, the longest for {:.0} ms; {} went on",
        match held.held {
            1 => "1 packet".to_owned(),
            many => format!("{many} packets"),
        },
        Bytes(held.peak_bytes),
        held.longest_held.as_secs_f64() * 1e3,
        held.released,
    );
    if held.dropped_by_bound > 0 {
        text.push_str(&format!(
            ", and {} more were dropped: no more could wait",
            held.dropped_by_bound
        ));
    }
    text
}

/// Says what went wrong, and what to do about it.
pub fn complain(error: &Error, json: bool) {
    if json {
        let report = serde_json::json!({
            "event": "error",
            "code": error.code(),
            "exit_code": exit::number(error),
            "error": error.full(),
            "hint": error.hint(),
            "findings": match error {
                Error::Refused { findings, .. } => serde_json::to_value(findings).unwrap_or_default(),
                _ => serde_json::Value::Null,
            },
        });
        println!("{report}");
        return;
    }
    eprintln!("livemig: {}", error.full());
    if let Some(hint) = error.hint() {
        eprintln!("  → {hint}");
    }
}
