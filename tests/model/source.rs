//! What processes at the source do: the migration, its roll-back, `livemig recover`.

use crate::state::{Answer, At, Original, Outgoing, Rules, State, Step, Verb};

impl State {
    /// Sends a request and waits for its answer.
    fn ask(&self, verb: Verb, at: At) -> State {
        self.but(|state| {
            state.request = Some(verb);
            state.at = at;
        })
    }

    fn go(&self, at: At) -> State {
        self.but(|state| state.at = at)
    }

    /// The process ends, and with it whatever it waits for and holds. Returns what may become of the
    /// request that is under way.
    fn ended(&self, rules: &Rules) -> Vec<State> {
        let mut ways = self.given_up();
        for state in &mut ways {
            state.at = At::Gone;
            state.holding = false;
            if !rules.dead_are_heard {
                state.late.restore = false;
                state.late.delete = false;
            }
        }
        ways.dedup();
        ways
    }

    /// The connection breaks, or the time is up: nobody waits for the answer any more, and the request
    /// is lost or arrives late.
    fn given_up(&self) -> Vec<State> {
        let mut lost = *self;
        lost.request = None;
        lost.answer = None;
        lost.awaited = false;
        let mut late = lost;
        let arrives = self.request.and_then(|verb| late.late.of(verb));
        match arrives {
            Some(it) => {
                *it = true;
                vec![lost, late]
            }
            None => vec![lost],
        }
    }

    /// Waiting without hope: nothing is under way that could end it.
    fn in_vain(&self) -> bool {
        self.request.is_none() && self.answer.is_none() && !self.awaited
    }

    /// What the processes at the source do when they are let.
    pub fn source(&self, rules: &Rules, steps: &mut Vec<Step>) {
        let mut good = |name, state| steps.push((name, false, state));
        match self.at {
            At::Begin => good(
                "source: journal `prepare`, ask to prepare",
                self.ask(Verb::Prepare, At::AwaitPrepared)
                    .but(|state| state.outgoing = Outgoing::Prepare),
            ),
            At::Ready => good(
                "source: journal what the downtime changes, hold",
                self.but(|state| {
                    state.outgoing = Outgoing::Restore;
                    state.holding = true;
                    state.at = At::Holding;
                }),
            ),
            At::Holding => good(
                "source: freeze",
                self.but(|state| {
                    state.original = Original::Frozen;
                    state.at = At::Frozen;
                }),
            ),
            At::Frozen => good(
                "source: mark the flows",
                self.but(|state| {
                    state.marked = true;
                    state.at = At::Marked;
                }),
            ),
            At::Marked => good(
                "source: ask to restore",
                self.ask(Verb::Restore, At::AwaitRunning),
            ),
            At::Heard => good(
                "source: let go",
                self.but(|state| {
                    state.holding = false;
                    state.at = At::LetGo;
                }),
            ),
            At::LetGo if !rules.commit_journaled_first => good(
                "source: tell that it is over, journal later",
                self.ask(Verb::Commit, At::AwaitCommitted),
            ),
            At::LetGo => good(
                "source: ask whether the copy still runs",
                self.ask(Verb::Get, At::AwaitStill),
            ),
            At::Committed => good(
                "source: tell that it is over",
                self.ask(Verb::Commit, At::AwaitCommitted),
            ),
            At::Told => good(
                "source: remove the original",
                self.but(|state| {
                    state.outgoing = Outgoing::Committed;
                    state.original = Original::Removed;
                    state.at = At::Forgot;
                }),
            ),
            At::Forgot => good(
                "source: end",
                self.but(|state| {
                    state.outgoing = Outgoing::None;
                    state.at = At::Gone;
                }),
            ),
            At::Undo => {
                let restored = self.outgoing == Outgoing::Restore;
                if restored && !rules.undone_before_thaw && self.original == Original::Frozen {
                    good("source: thaw before anything else", self.but(thaw));
                } else if restored {
                    good(
                        "source: ask to undo",
                        self.ask(Verb::Delete, At::AwaitUndone),
                    );
                } else {
                    good(
                        "source: ask to undo what was prepared",
                        self.ask(Verb::Delete, At::AwaitTidied),
                    );
                }
            }
            At::Undone => good(
                "source: clear the marks",
                self.but(|state| {
                    state.marked = false;
                    state.at = At::Unmarked;
                }),
            ),
            At::Unmarked => good(
                "source: thaw, let go",
                self.but(|state| {
                    thaw(state);
                    state.holding = false;
                    state.at = At::Thawed;
                }),
            ),
            At::Thawed => good(
                "source: ask to undo what was prepared",
                self.ask(Verb::Delete, At::AwaitTidied),
            ),
            At::Recover => match self.outgoing {
                Outgoing::Committed => good("recover: finish", self.go(At::Finish)),
                Outgoing::Restore if rules.recover_asks => good(
                    "recover: ask where it stands",
                    self.ask(Verb::Get, At::AwaitStage),
                ),
                _ => good("recover: undo", self.go(At::Undo)),
            },
            At::Finish => good(
                "recover: tell that it is over",
                self.ask(Verb::Commit, At::AwaitHandedOver),
            ),
            At::HandedOver => good(
                "recover: remove the original",
                self.but(|state| {
                    // One that runs again is not the one that was to be forgotten.
                    if state.original != Original::Runs {
                        state.original = Original::Removed;
                    }
                    state.at = At::Forgot;
                }),
            ),
            At::Gone => {
                if self.outgoing != Outgoing::None {
                    good("operator: livemig recover", self.go(At::Recover));
                }
            }
            At::AwaitPrepared
            | At::AwaitRunning
            | At::AwaitStill
            | At::AwaitCommitted
            | At::AwaitUndone
            | At::AwaitTidied
            | At::AwaitStage
            | At::AwaitHandedOver => self.wait(rules, steps),
        }
    }

    /// A process that waits for an answer hears it, or that there is none.
    fn wait(&self, rules: &Rules, steps: &mut Vec<Step>) {
        if let Some(answer) = self.answer {
            let heard = self.but(|state| state.answer = None);
            steps.push(("source: hear the answer", false, heard.hears(answer)));
        }
        // While an answer may yet come this is bad luck, else the way on.
        let fault = !self.in_vain();
        for state in self.given_up() {
            match self.at {
                At::AwaitPrepared | At::AwaitRunning => {
                    steps.push(("source: no answer, undo", fault, state.go(At::Undo)));
                }
                At::AwaitUndone if !rules.thaw_only_when_undone => {
                    steps.push((
                        "source: no answer, thaw on a guess",
                        fault,
                        state.go(At::Undone),
                    ));
                }
                At::AwaitUndone => {
                    steps.push(("source: no answer, ask again", fault, state.go(At::Undo)));
                }
                At::AwaitStage => {
                    steps.push((
                        "recover: no answer, ask again",
                        fault,
                        state.go(At::Recover),
                    ));
                }
                _ => {}
            }
        }
        // In doubt, or with something left: the journal stays.
        if !matches!(self.at, At::AwaitPrepared | At::AwaitRunning) {
            for state in self.ended(rules) {
                steps.push(("source: no answer, end in doubt", fault, state));
            }
        }
    }

    fn hears(&self, answer: Answer) -> State {
        match (self.at, answer) {
            (At::AwaitPrepared, Answer::Prepared) => self.go(At::Ready),
            (At::AwaitPrepared, _) => self.go(At::Undo),
            (At::AwaitRunning, Answer::Running) => self.go(At::Heard),
            (At::AwaitRunning, _) => self.go(At::Undo),
            (At::AwaitStill, Answer::Runs(true)) => self.but(|state| {
                state.outgoing = Outgoing::Committed;
                state.at = At::Committed;
            }),
            (At::AwaitCommitted, Answer::Committed) => self.go(At::Told),
            (At::AwaitHandedOver, Answer::Committed) => self.go(At::HandedOver),
            (At::AwaitUndone, Answer::Undone) => self.go(At::Undone),
            (At::AwaitUndone, _) => self.go(At::Undo),
            (At::AwaitTidied, Answer::Undone | Answer::Committed) => self.but(|state| {
                state.outgoing = Outgoing::None;
                state.at = At::Gone;
            }),
            (At::AwaitStage, Answer::Runs(true)) => self.but(|state| {
                state.outgoing = Outgoing::Committed;
                state.at = At::Finish;
            }),
            (At::AwaitStage, Answer::Runs(false)) => self.go(At::Undo),
            (At::AwaitStage, _) => self.go(At::Recover),
            _ => self.go(At::Gone),
        }
    }

    pub fn source_faults(&self, rules: &Rules, steps: &mut Vec<Step>) {
        // Before the migration there is nothing that it could have to answer for.
        if self.at == At::Begin {
            return;
        }
        if self.at != At::Gone {
            for state in self.ended(rules) {
                steps.push(("source: the process is killed", true, state));
            }
        }
        if matches!(
            self.at,
            At::AwaitPrepared
                | At::Ready
                | At::Holding
                | At::Frozen
                | At::Marked
                | At::AwaitRunning
                | At::Heard
        ) {
            for state in self.given_up() {
                steps.push(("user: Ctrl-C", true, state.go(At::Undo)));
            }
        }
        if self.outgoing != Outgoing::None {
            for mut state in self.ended(rules) {
                state.marked = false;
                if matches!(state.original, Original::Runs | Original::Frozen) {
                    state.original = match rules.restarts_containers {
                        true => Original::Runs,
                        false => Original::Ended,
                    };
                }
                steps.push(("source: the host crashes", true, state));
            }
        }
    }
}

fn thaw(state: &mut State) {
    if state.original == Original::Frozen {
        state.original = Original::Runs;
    }
}
