//! All states that can be reached, breadth first, so that the way to each is the shortest one.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

use crate::state::{Rules, START, State, Violation};

/// What there is to say of a machine.
pub struct Explored {
    pub states: usize,
    pub steps: usize,
    /// Those in which all is over.
    pub ends: Vec<State>,
    /// The longest of the shortest ways.
    pub depth: usize,
    /// The shortest way to each kind of violation.
    pub violations: Vec<(Violation, Trace)>,
}

/// How a state was reached.
pub struct Trace {
    steps: Vec<&'static str>,
    last: State,
}

impl Explored {
    pub fn kinds(&self) -> Vec<Violation> {
        let mut kinds: Vec<_> = self.violations.iter().map(|(kind, _)| *kind).collect();
        kinds.sort();
        kinds
    }

    pub fn trace(&self, kind: Violation) -> Option<&Trace> {
        let mut found = self.violations.iter();
        found.find_map(|(it, trace)| (*it == kind).then_some(trace))
    }
}

impl Trace {
    pub fn has(&self, step: &str) -> bool {
        self.steps.iter().any(|it| it.contains(step))
    }
}

impl fmt::Display for Explored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} states, {} steps, {} ends, depth {}",
            self.states,
            self.steps,
            self.ends.len(),
            self.depth
        )?;
        for (violation, trace) in &self.violations {
            write!(f, "\n{violation:?}:\n{trace}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, step) in self.steps.iter().enumerate() {
            writeln!(f, "  {:2}. {step}", number + 1)?;
        }
        write!(f, "  = {:?}", self.last)
    }
}

/// Visits every state, also those beyond one that violates something.
pub fn explore(rules: &Rules) -> Explored {
    let mut places = HashMap::from([(START, 0)]);
    let mut found = vec![Found {
        state: START,
        from: None,
        depth: 0,
    }];
    // Who can come here without a fault.
    let mut back: Vec<Vec<usize>> = vec![Vec::new()];
    let mut ends = Vec::new();
    let mut violations: Vec<(Violation, usize)> = Vec::new();
    let mut steps = 0;
    let mut place = 0;
    while place < found.len() {
        let Found { state, depth, .. } = found[place];
        if let Some(violation) = state.violation()
            && violations.iter().all(|(kind, _)| *kind != violation)
        {
            violations.push((violation, place));
        }
        if state.is_terminal() {
            ends.push(place);
        }
        for (name, fault, next) in state.steps(rules) {
            steps += 1;
            let to = match places.entry(next) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(entry) => {
                    found.push(Found {
                        state: next,
                        from: Some((place, name)),
                        depth: depth + 1,
                    });
                    back.push(Vec::new());
                    *entry.insert(found.len() - 1)
                }
            };
            if !fault {
                back[to].push(place);
            }
        }
        place += 1;
    }
    let mut open = ends.clone();
    let mut arrives = vec![false; found.len()];
    while let Some(place) = open.pop() {
        if !std::mem::replace(&mut arrives[place], true) {
            open.extend(&back[place]);
        }
    }
    if let Some(stuck) = arrives.iter().position(|arrives| !arrives) {
        violations.push((Violation::Stuck, stuck));
    }
    Explored {
        states: found.len(),
        steps,
        ends: ends.into_iter().map(|place| found[place].state).collect(),
        depth: found.iter().map(|it| it.depth).max().unwrap_or(0),
        violations: violations
            .into_iter()
            .map(|(kind, place)| (kind, trace(&found, place)))
            .collect(),
    }
}

struct Found {
    state: State,
    /// From where, and by which step.
    from: Option<(usize, &'static str)>,
    depth: usize,
}

fn trace(found: &[Found], place: usize) -> Trace {
    let mut steps = Vec::new();
    let mut at = place;
    while let Some((from, step)) = found[at].from {
        steps.push(step);
        at = from;
    }
    steps.reverse();
    Trace {
        steps,
        last: found[place].state,
    }
}
