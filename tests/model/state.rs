//! One migration as a finite machine: both hosts, what is on their disks and in their kernels, and the
//! network between them.
//!
//! A step here is a step of the code after which a crash would find something else. What takes several
//! lines in the code but cannot be told apart from outside is one step. Nothing is counted: crashes,
//! losses, cancels and recoveries may come as often as they like, and the machine is finite all the same.

/// The rules of the code whose absence the checker has to notice, and what the world around it may do.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// `undo::give_up`: only the destination's word that it has nothing lets the source go on.
    pub thaw_only_when_undone: bool,
    /// The order of the journal (`hold.rs`): the destination gives up its copy before the thaw.
    pub undone_before_thaw: bool,
    /// `commit.rs`: the source writes that there is no way back before the destination forgets it.
    pub commit_journaled_first: bool,
    /// `recover::runs_elsewhere`: a copy that runs at the destination stays.
    pub recover_asks: bool,
    /// `Sessions::resume`: a copy that runs is not undone by a new agent.
    pub resume_keeps_what_runs: bool,
    /// `undo::restores_ended`: what Podman was asked for has ended before its result is removed.
    pub wait_for_podman: bool,
    /// `Sessions::commit_left_behind`: a new agent opens the gate that the old one left closed.
    pub commit_opens_gate: bool,
    /// What a process of the source that has ended has sent to restore or to undo still arrives.
    pub dead_are_heard: bool,
    /// A restore that the agent calls failed brought the container to life, or yet does, and that
    /// copy cannot be removed.
    pub failures_linger: bool,
    /// The transport delivers requests to prepare and to restore twice. TLS does not.
    pub replays: bool,
    /// The source's host starts its containers again when it comes up (`podman-restart.service`).
    pub restarts_containers: bool,
}

impl Rules {
    /// What the code does, in a world without the holes that are known (see the tests).
    pub const KEPT: Rules = Rules {
        thaw_only_when_undone: true,
        undone_before_thaw: true,
        commit_journaled_first: true,
        recover_asks: true,
        resume_keeps_what_runs: true,
        wait_for_podman: true,
        commit_opens_gate: true,
        dead_are_heard: false,
        failures_linger: false,
        replays: false,
        restarts_containers: false,
    };
}

/// Where a process at the source is: the migration itself, its roll-back, or `livemig recover`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum At {
    /// There is no process.
    Gone,
    // The migration.
    Begin,
    AwaitPrepared,
    Ready,
    Holding,
    Frozen,
    Marked,
    AwaitRunning,
    Heard,
    LetGo,
    /// Whether the copy still runs.
    AwaitStill,
    Committed,
    AwaitCommitted,
    /// The destination has answered that it is over.
    Told,
    Forgot,
    // Back, also in `recover`.
    Undo,
    AwaitUndone,
    Undone,
    Unmarked,
    Thawed,
    AwaitTidied,
    // `recover`.
    Recover,
    AwaitStage,
    Finish,
    AwaitHandedOver,
    HandedOver,
}

/// The last decisive line of the source's journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outgoing {
    None,
    /// The destination was asked to prepare.
    Prepare,
    /// All that the downtime changes, with the request to restore.
    Restore,
    Committed,
}

/// The container at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Original {
    Runs,
    Frozen,
    Removed,
    /// Its host crashed.
    Ended,
}

/// The last decisive line of the destination's journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Incoming {
    None,
    Prepared,
    Restored,
    Committed,
}

/// The container at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Copy {
    Absent,
    Runs,
    /// Its host crashed.
    Ended,
}

/// The agent's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Agent {
    Down,
    /// Undoes what it found, before it listens.
    Resuming,
    Up,
}

/// What the agent remembers of the migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Session {
    None,
    Prepared,
    Restoring,
    Running,
}

/// What has the session's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Work {
    None,
    Preparing,
    Restoring,
    AwaitPodman,
    GateOpened,
    /// Undoing, and what the answer will be.
    Undoing(Answer),
    Removed(Answer),
    Committing,
}

/// Requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verb {
    Prepare,
    Restore,
    Get,
    Delete,
    Commit,
}

/// Answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Answer {
    Prepared,
    Running,
    Undone,
    Committed,
    /// Status: it runs there, or it does not.
    Runs(bool),
    Refused,
}

/// Requests on connections that their sender has given up, as a set: each may arrive later, in any
/// order, again and again, or never. Late questions change nothing and are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Late {
    pub prepare: bool,
    pub restore: bool,
    pub delete: bool,
    pub commit: bool,
}

impl Late {
    pub fn of(&mut self, verb: Verb) -> Option<&mut bool> {
        match verb {
            Verb::Prepare => Some(&mut self.prepare),
            Verb::Restore => Some(&mut self.restore),
            Verb::Delete => Some(&mut self.delete),
            Verb::Commit => Some(&mut self.commit),
            Verb::Get => None,
        }
    }
}

/// All of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct State {
    // The source.
    pub at: At,
    pub outgoing: Outgoing,
    pub original: Original,
    /// A process keeps packets in the queue. When it ends, they pass (the queue's *bypass*).
    pub holding: bool,
    /// Packets that pass go to the destination.
    pub marked: bool,
    // The network.
    pub request: Option<Verb>,
    pub answer: Option<Answer>,
    pub late: Late,
    // The destination.
    pub agent: Agent,
    pub session: Session,
    pub work: Work,
    /// Somebody waits for what comes of the work.
    pub awaited: bool,
    pub incoming: Incoming,
    /// Podman is restoring. It goes on when the agent has died.
    pub podman: bool,
    pub copy: Copy,
    pub gate_closed: bool,
    // What has been.
    /// Peers have heard the copy.
    pub seen: bool,
    /// The copy was removed though peers had heard it, or though it was the last one.
    pub taken_back: bool,
    /// A crash of its host ended the copy.
    pub copy_lost: bool,
}

/// What is never to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Violation {
    /// Both run.
    TwoCopies,
    /// None can run, and not because a host crashed that had one.
    NoCopy,
    /// The world has heard the copy, or there is no other, and it was removed; or the original goes on
    /// instead of what the world has heard.
    TakenBack,
    /// All is over, and something is left, or nothing can be heard.
    Unclean,
    /// No end can be reached any more, though everything works again.
    Stuck,
}

/// A step, what it is called, and whether it is a fault: what need not happen for all to end well.
pub type Step = (&'static str, bool, State);

/// The container runs at the source; somebody types `livemig migrate`.
pub const START: State = State {
    at: At::Begin,
    outgoing: Outgoing::None,
    original: Original::Runs,
    holding: false,
    marked: false,
    request: None,
    answer: None,
    late: Late {
        prepare: false,
        restore: false,
        delete: false,
        commit: false,
    },
    agent: Agent::Up,
    session: Session::None,
    work: Work::None,
    awaited: false,
    incoming: Incoming::None,
    podman: false,
    copy: Copy::Absent,
    gate_closed: false,
    seen: false,
    taken_back: false,
    copy_lost: false,
};

impl State {
    /// The migration is over for both hosts, and the network is empty.
    pub fn is_terminal(&self) -> bool {
        self.at == At::Gone
            && self.outgoing == Outgoing::None
            && self.late == Late::default()
            && self.agent == Agent::Up
            && self.session == Session::None
            && self.work == Work::None
            && self.incoming == Incoming::None
            && !self.podman
    }

    pub fn violation(&self) -> Option<Violation> {
        match (self.original, self.copy) {
            (Original::Runs, Copy::Runs) => return Some(Violation::TwoCopies),
            (Original::Removed, Copy::Absent) => return Some(Violation::NoCopy),
            // A crash took the last one with it.
            (Original::Ended, Copy::Absent | Copy::Ended) | (Original::Removed, Copy::Ended) => {}
            (Original::Runs | Original::Frozen, _) | (_, Copy::Runs) => {}
        }
        // A copy that the world has heard and that died with its host: the original, if it is still
        // there and the source has not written that it is given up, goes on as of the freeze.
        let steps_back = self.seen && self.original == Original::Runs && !self.copy_lost;
        if self.taken_back || steps_back {
            return Some(Violation::TakenBack);
        }
        if self.is_terminal() && !self.is_clean() {
            return Some(Violation::Unclean);
        }
        None
    }

    fn is_clean(&self) -> bool {
        let place = match (self.original, self.copy) {
            (Original::Runs, Copy::Absent) => !self.marked,
            (Original::Removed, Copy::Runs) => true,
            // With its host: see `violation`.
            (Original::Removed, Copy::Ended) | (Original::Ended, Copy::Absent) => true,
            _ => false,
        };
        place && !self.gate_closed && !self.holding
    }

    /// All that may happen next.
    pub fn steps(&self, rules: &Rules) -> Vec<Step> {
        let mut steps = Vec::new();
        self.source(rules, &mut steps);
        self.source_faults(rules, &mut steps);
        self.network(rules, &mut steps);
        self.destination(rules, &mut steps);
        self.destination_faults(&mut steps);
        for (_, _, state) in &mut steps {
            let audible = state.copy == Copy::Runs
                && !state.gate_closed
                // Undoing begins with making the copy quiet.
                && !matches!(state.work, Work::Undoing(_));
            state.seen |= audible && state.marked && !state.holding;
        }
        steps
    }

    pub fn but(&self, change: impl FnOnce(&mut State)) -> State {
        let mut state = *self;
        change(&mut state);
        state
    }
}
