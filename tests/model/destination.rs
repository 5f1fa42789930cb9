//! What the agent and Podman do at the destination.

use crate::state::{Agent, Answer, Copy, Incoming, Rules, Session, State, Step, Work};

impl State {
    /// Takes the lock.
    pub fn begin(&mut self, work: Work, awaited: bool) {
        self.work = work;
        self.awaited = awaited;
    }

    /// The work is done.
    fn answers(&mut self, answer: Answer) {
        self.work = Work::None;
        if self.awaited {
            self.answer = Some(answer);
        }
        self.awaited = false;
        if self.agent == Agent::Resuming {
            self.agent = Agent::Up;
        }
    }

    pub fn destination(&self, rules: &Rules, steps: &mut Vec<Step>) {
        let mut step = |name, fault, state| steps.push((name, fault, state));
        if self.podman {
            step(
                "podman: the copy runs",
                false,
                self.but(|state| {
                    state.podman = false;
                    state.copy = Copy::Runs;
                }),
            );
            step(
                "podman: the restore fails",
                true,
                self.but(|state| state.podman = false),
            );
        }
        match self.work {
            Work::None => {}
            Work::Preparing => {
                // A container that is there already is refused.
                if self.copy == Copy::Absent {
                    step(
                        "agent: gate closed, prepared",
                        false,
                        self.but(|state| {
                            state.gate_closed = true;
                            state.answers(Answer::Prepared);
                        }),
                    );
                }
                step(
                    "agent: cannot prepare",
                    self.copy == Copy::Absent,
                    self.but(|state| state.work = Work::Undoing(Answer::Refused)),
                );
            }
            Work::Restoring => step(
                "agent: have podman restore",
                false,
                self.but(|state| {
                    state.podman = true;
                    state.work = Work::AwaitPodman;
                }),
            ),
            Work::AwaitPodman => {
                if self.podman || self.copy == Copy::Absent {
                    step(
                        "agent: no copy from podman, undo",
                        self.podman,
                        self.but(|state| state.work = Work::Undoing(Answer::Refused)),
                    );
                } else {
                    step(
                        "agent: open the gate",
                        false,
                        self.but(|state| {
                            state.gate_closed = false;
                            state.work = Work::GateOpened;
                        }),
                    );
                    step(
                        "agent: cannot open the gate, undo",
                        true,
                        self.but(|state| state.work = Work::Undoing(Answer::Refused)),
                    );
                }
            }
            Work::GateOpened => step(
                "agent: answer `running`",
                false,
                self.but(|state| {
                    state.session = Session::Running;
                    state.answers(Answer::Running);
                }),
            ),
            Work::Undoing(answer) => {
                if !self.podman || !rules.wait_for_podman {
                    step(
                        "agent: remove the copy, open the gate",
                        false,
                        self.but(|state| {
                            if state.incoming == Incoming::Restored {
                                state.taken_back |= state.seen && state.copy == Copy::Runs;
                                state.copy = Copy::Absent;
                            }
                            state.gate_closed = false;
                            state.work = Work::Removed(answer);
                        }),
                    );
                }
                // A restore that the agent calls failed, and that has succeeded or yet will.
                let succeeded = self.session == Session::Restoring && self.copy == Copy::Runs;
                let lingers = self.podman || succeeded;
                if rules.failures_linger || !lingers {
                    step(
                        "agent: cannot remove it",
                        true,
                        self.but(|state| state.answers(Answer::Refused)),
                    );
                }
            }
            Work::Removed(answer) => step(
                "agent: close the journal, answer",
                false,
                self.but(|state| {
                    state.session = Session::None;
                    state.incoming = Incoming::None;
                    state.answers(answer);
                }),
            ),
            Work::Committing => step(
                "agent: close the journal, answer `committed`",
                false,
                self.but(|state| {
                    state.session = Session::None;
                    state.incoming = Incoming::None;
                    state.answers(Answer::Committed);
                }),
            ),
        }
        if self.agent == Agent::Up && self.work == Work::None && self.session == Session::Prepared {
            step(
                "agent: its source is silent, undo",
                // It may also be only slow; but it will come to this when nothing else happens.
                false,
                self.but(|state| state.work = Work::Undoing(Answer::Undone)),
            );
        }
        let left = matches!(self.incoming, Incoming::Prepared | Incoming::Restored)
            && self.session == Session::None
            && self.copy != Copy::Runs;
        if self.agent == Agent::Up && self.work == Work::None && left {
            // What it could not undo when it started it tries again when it starts again, not before.
            let again = self.but(|state| state.resume(rules));
            step("operator: restart the agent", false, again);
        }
        if self.agent == Agent::Down {
            step(
                "agent: starts",
                false,
                self.but(|state| state.resume(rules)),
            );
        }
    }

    /// What a new agent does with the journal that it finds.
    fn resume(&mut self, rules: &Rules) {
        let ran = self.copy != Copy::Absent && rules.resume_keeps_what_runs;
        self.agent = Agent::Up;
        match self.incoming {
            Incoming::None => {}
            Incoming::Committed => {
                self.incoming = Incoming::None;
                self.gate_closed &= !rules.commit_opens_gate;
            }
            Incoming::Restored if ran => {}
            Incoming::Prepared | Incoming::Restored => {
                self.agent = Agent::Resuming;
                self.work = Work::Undoing(Answer::Undone);
            }
        }
    }

    pub fn destination_faults(&self, steps: &mut Vec<Step>) {
        if self.agent == Agent::Down && !self.podman && self.copy != Copy::Runs {
            return;
        }
        let killed = self.but(|state| {
            state.agent = Agent::Down;
            state.session = Session::None;
            state.work = Work::None;
            state.awaited = false;
        });
        let mut crashed = killed;
        crashed.podman = false;
        crashed.gate_closed = false;
        if crashed.copy == Copy::Runs {
            crashed.copy = Copy::Ended;
            crashed.copy_lost = true;
        }
        if self.agent != Agent::Down {
            steps.push(("agent: is killed", true, killed));
        }
        steps.push(("destination: the host crashes", true, crashed));
    }
}
