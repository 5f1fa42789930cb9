//! What the time is spent on in which a container answers nobody.
//!
//! The parts follow one another and add up to the downtime. Where two things are done at once, the part has
//! the name of the one that is waited for.

use std::time::{Duration, Instant};

use serde::Serialize;

/// A part of the downtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// Everybody waits, and the container reads what had arrived before.
    Drain,
    /// Its processes come to a stop.
    Freeze,
    /// CRIU takes its state; with the direct engine the memory crosses meanwhile. Its flows are marked,
    /// its changed files are collected.
    Dump,
    /// What is left of it crosses.
    Transfer,
    /// Its flows are entered at the destination.
    Insert,
    /// CRIU brings it back, with the rest engine also Podman makes it.
    Restore,
    /// Packets are let in to it, and the source hears of that.
    Admit,
    /// The packets that waited are told where to go.
    Release,
    /// Until the container answers, with post-copy: the pages cross that it waits for.
    Fetch,
}

/// How long a part took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PartTime {
    /// Which part.
    pub part: Part,
    /// How long.
    #[serde(rename = "ms", serialize_with = "super::report::milliseconds")]
    pub took: Duration,
}

/// Takes the time while it runs.
#[derive(Debug, Default)]
pub(super) struct Downtime {
    began: Option<Instant>,
    frozen: Option<Instant>,
    /// Since when it is known that the container runs.
    runs: Option<Instant>,
    last: Option<Instant>,
    parts: Vec<PartTime>,
    total: Duration,
    total_frozen: Duration,
}

impl Downtime {
    /// It began then.
    pub fn begin(&mut self, then: Instant) {
        self.began = Some(then);
        self.last = Some(then);
    }

    /// A part has come to its end.
    pub fn part(&mut self, part: Part) {
        self.part_until(part, Instant::now());
    }

    fn part_until(&mut self, part: Part, now: Instant) {
        if let Some(last) = self.last.replace(now) {
            let took = now.saturating_duration_since(last);
            self.parts.push(PartTime { part, took });
        }
        match part {
            Part::Freeze => self.frozen = Some(now),
            Part::Restore => self.runs = Some(now),
            _ => {}
        }
    }

    /// The last part is in truth these, in this order; the first of them has what is left.
    pub fn divide(&mut self, first: Part, others: &[(Part, Duration)]) {
        let Some(whole) = self.parts.pop() else {
            return;
        };
        let rest = others.iter().map(|(_, took)| *took).sum();
        let took = whole.took.saturating_sub(rest);
        self.parts.push(PartTime { part: first, took });
        let others = others.iter();
        self.parts
            .extend(others.map(|&(part, took)| PartTime { part, took }));
    }

    /// It was over then, with its last part.
    pub fn end(&mut self, last: Part, then: Instant) {
        self.part_until(last, then);
        let since = |began: Option<Instant>| {
            began
                .map(|began| then.saturating_duration_since(began))
                .unwrap_or_default()
        };
        self.total = since(self.began);
        self.total_frozen = since(self.frozen);
    }

    /// It has ended, and gone on in the container: until it had run for so long.
    pub fn prolong_until(&mut self, ran: Duration, part: Part) {
        let known = self.runs.zip(self.last);
        let took = known.map(|(runs, last)| ran.min(runs.elapsed()).saturating_sub(last - runs));
        if let Some(took) = took.filter(|took| !took.is_zero()) {
            self.parts.push(PartTime { part, took });
            self.total += took;
        }
    }

    /// How long it was, in all; zero if it has not ended.
    pub fn total(&self) -> Duration {
        self.total
    }

    /// How long the container's processes ran nowhere.
    pub fn frozen(&self) -> Duration {
        self.total_frozen
    }

    /// Its parts.
    pub fn into_parts(self) -> Vec<PartTime> {
        self.parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up() {
        let mut downtime = Downtime::default();
        downtime.begin(Instant::now() - Duration::from_millis(100));
        downtime.part(Part::Drain);
        downtime.part(Part::Restore);
        let whole = downtime.parts[1].took;
        let insert = Duration::from_nanos(1);
        downtime.divide(
            Part::Transfer,
            &[(Part::Insert, insert), (Part::Restore, whole - insert)],
        );
        downtime.end(Part::Release, Instant::now());
        let total = downtime.total();
        assert!(downtime.frozen() < total);
        let parts = downtime.into_parts();
        let names: Vec<Part> = parts.iter().map(|time| time.part).collect();
        let expected = [
            Part::Drain,
            Part::Transfer,
            Part::Insert,
            Part::Restore,
            Part::Release,
        ];
        assert_eq!(names, expected);
        let sum: Duration = parts.iter().map(|time| time.took).sum();
        assert!(
            total >= sum && total - sum < Duration::from_millis(5),
            "{total:?} {sum:?}"
        );
    }

    #[test]
    fn it_goes_on_until_the_container_answers() {
        let mut downtime = Downtime::default();
        downtime.begin(Instant::now());
        downtime.part(Part::Restore);
        downtime.end(Part::Release, Instant::now());
        let (ended, parts) = (downtime.total(), downtime.parts.clone());
        // It has answered before packets were let go.
        downtime.prolong_until(Duration::ZERO, Part::Fetch);
        assert_eq!(downtime.total(), ended);
        std::thread::sleep(Duration::from_millis(2));
        let answered = Duration::from_millis(1);
        downtime.prolong_until(answered, Part::Fetch);
        let fetch = downtime.parts[parts.len()];
        assert_eq!(fetch.part, Part::Fetch);
        assert_eq!(fetch.took + parts[1].took, answered);
        assert_eq!(downtime.total(), ended + fetch.took);
        // What another host says is no longer than it can be.
        let mut other = Downtime::default();
        other.begin(Instant::now());
        other.part(Part::Restore);
        other.end(Part::Release, Instant::now());
        other.prolong_until(Duration::MAX, Part::Fetch);
        assert!(
            other.total() < Duration::from_secs(60),
            "{:?}",
            other.total()
        );
    }
}
