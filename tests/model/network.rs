//! The network, and what the agent says to what arrives.

use crate::state::{
    Agent, Answer, Copy, Incoming, Original, Rules, Session, State, Step, Verb, Work,
};

impl State {
    pub fn network(&self, rules: &Rules, steps: &mut Vec<Step>) {
        for verb in [Verb::Prepare, Verb::Restore, Verb::Delete, Verb::Commit] {
            let mut gone = *self;
            if gone.late.of(verb).is_none_or(|late| !*late) {
                continue;
            }
            if let Some(late) = gone.late.of(verb) {
                *late = false;
            }
            steps.push(("network: a late request is lost", false, gone));
            if let Some((name, state)) = gone.arrives(verb, false, rules) {
                steps.push((late_name(name), true, state));
            }
            if let Some((name, state)) = self.arrives(verb, false, rules)
                && twice(verb, rules)
            {
                steps.push((late_name(name), true, state));
            }
        }
        if self.request.is_some() {
            let lost = self.but(|state| state.request = None);
            steps.push(("network: the request is lost", true, lost));
        }
        if let Some(verb) = self.request {
            let once = self.but(|state| state.request = None);
            if let Some((name, state)) = once.arrives(verb, true, rules) {
                steps.push((name, false, state));
                let mut again = state;
                if let Some(late) = again.late.of(verb)
                    && twice(verb, rules)
                {
                    *late = true;
                    steps.push(("network: a request arrives, and will again", true, again));
                }
            }
        }
        if self.answer.is_some() {
            let lost = self.but(|state| state.answer = None);
            steps.push(("network: the answer is lost", true, lost));
        }
    }

    /// The agent takes up a request. One that finds the lock taken waits: it has not arrived yet.
    fn arrives(&self, verb: Verb, awaited: bool, rules: &Rules) -> Option<(&'static str, State)> {
        if self.agent != Agent::Up || self.work != Work::None {
            return None;
        }
        let mut state = *self;
        let known = self.incoming != Incoming::None;
        let (name, answer) = match verb {
            // One that knows the number already does not begin its journal again.
            Verb::Prepare if known => ("agent: refuse to prepare", Some(Answer::Refused)),
            Verb::Prepare => {
                state.begin(Work::Preparing, awaited);
                state.session = Session::Prepared;
                state.incoming = Incoming::Prepared;
                ("agent: journal, begin to prepare", None)
            }
            Verb::Restore if self.session == Session::Prepared => {
                state.begin(Work::Restoring, awaited);
                state.session = Session::Restoring;
                state.incoming = Incoming::Restored;
                ("agent: journal, begin to restore", None)
            }
            Verb::Restore => ("agent: refuse to restore", Some(Answer::Refused)),
            Verb::Get => {
                let runs = match self.session {
                    Session::None => known && self.copy == Copy::Runs,
                    session => session == Session::Running,
                };
                ("agent: say where it stands", Some(Answer::Runs(runs)))
            }
            Verb::Delete if known => {
                let last = matches!(self.original, Original::Removed | Original::Ended);
                state.taken_back |= last && self.copy == Copy::Runs;
                state.begin(Work::Undoing(Answer::Undone), awaited);
                ("agent: begin to undo, the copy is quiet", None)
            }
            Verb::Delete => ("agent: nothing to undo", Some(Answer::Undone)),
            Verb::Commit => match self.session {
                Session::Running => {
                    state.begin(Work::Committing, awaited);
                    state.incoming = Incoming::Committed;
                    ("agent: journal `committed`", None)
                }
                Session::None => {
                    if known {
                        state.incoming = Incoming::None;
                        state.gate_closed &= !rules.commit_opens_gate;
                    }
                    (
                        "agent: forget what was left behind",
                        Some(Answer::Committed),
                    )
                }
                _ => ("agent: refuse to commit", Some(Answer::Refused)),
            },
        };
        if awaited {
            state.answer = answer;
        }
        Some((name, state))
    }
}

/// Whether the network may deliver it twice: those that are asked again by themselves may come twice.
fn twice(verb: Verb, rules: &Rules) -> bool {
    rules.replays || matches!(verb, Verb::Delete | Verb::Commit)
}

fn late_name(name: &'static str) -> &'static str {
    match name {
        "agent: begin to undo, the copy is quiet" => "late request to undo arrives: begin to undo",
        "agent: journal, begin to restore" => "late request to restore arrives: begin to restore",
        "agent: journal, begin to prepare" => "late request to prepare arrives: begin to prepare",
        _ => "late request arrives: nothing changes, or what was left is forgotten",
    }
}
