//! The moments at which a migration is struck: one in each phase, where most is at stake, and one more
//! past the point of no return.

use super::lab::pair::Pair;
use super::lab::{LOOK, Node, Process, gate};

/// What the command is told to have this engine move a container.
pub fn arguments(engine: &str) -> &'static [&'static str] {
    match engine {
        "rest" => &["--engine", "rest"],
        "direct" => &["--engine", "direct"],
        "postcopy" => &["--engine", "direct", "--post-copy"],
        other => panic!("there is no engine {other}"),
    }
}

/// What is to move, and how.
#[derive(Debug, Clone, Copy)]
pub struct Move {
    pub engine: &'static str,
    pub container: &'static str,
    /// The number of the host that it is to leave.
    pub from: usize,
    /// And of the one that it is to go to.
    pub to: usize,
}

/// Where a migration is brought to a stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Nothing has been asked yet.
    Preflight,
    /// The destination's agent has begun to make itself ready, and waits for its Podman.
    Prepare,
    /// Both ends are ready.
    Precopy,
    /// Packets wait.
    Hold,
    /// Packets wait, the processes stand still, and are about to be dumped.
    Freeze,
    /// They are dumped, and the connections marked.
    Transfer,
    /// The destination has all of the container, and is about to restore it.
    Restore,
    /// The copy runs, and nobody has heard it.
    Steer,
    /// The copy has been heard, and the source has not written that down.
    Commit,
    /// It has, and its Podman is removing the old container.
    Removal,
}

/// The gate before CRIU.
const CRIU: &str = "criu";

/// How the migration is made to stand still there.
enum Halt {
    /// By itself, as it tells of this event.
    Event(&'static str),
    /// Because the destination's Podman does not answer.
    Podman,
    /// At the gate before this verb of the source's runtime, or before CRIU there.
    Source(&'static str),
    /// At such a gate at the destination.
    Destination(&'static str),
}

impl Moment {
    /// All of them, in their order.
    pub const ALL: [Moment; 10] = [
        Moment::Preflight,
        Moment::Prepare,
        Moment::Precopy,
        Moment::Hold,
        Moment::Freeze,
        Moment::Transfer,
        Moment::Restore,
        Moment::Steer,
        Moment::Commit,
        Moment::Removal,
    ];

    /// As it stands in `LIVEMIG_FAULTS` and in the table.
    pub fn name(self) -> &'static str {
        match self {
            Moment::Removal => "removal",
            other => other.phase(),
        }
    }

    /// The phase that it is in.
    pub fn phase(self) -> &'static str {
        match self {
            Moment::Preflight => "preflight",
            Moment::Prepare => "prepare",
            Moment::Precopy => "precopy",
            Moment::Hold => "hold",
            Moment::Freeze => "freeze",
            Moment::Transfer => "transfer",
            Moment::Restore => "restore",
            Moment::Steer => "steer",
            Moment::Commit | Moment::Removal => "commit",
        }
    }

    /// With the direct engine the runtimes have been called before, and CRIU waits for the word.
    fn halt(self, engine: &str) -> Halt {
        match self {
            Moment::Freeze if engine != "rest" => Halt::Source(CRIU),
            Moment::Restore if engine != "rest" => Halt::Destination(CRIU),
            Moment::Preflight => Halt::Event("started:preflight"),
            Moment::Prepare => Halt::Podman,
            Moment::Precopy => Halt::Event("started:precopy"),
            Moment::Hold => Halt::Event("finished:hold"),
            Moment::Freeze => Halt::Source("checkpoint"),
            Moment::Transfer => Halt::Event("started:transfer"),
            Moment::Restore => Halt::Destination("restore"),
            Moment::Steer => Halt::Event("started:steer"),
            Moment::Commit => Halt::Event("started:commit"),
            Moment::Removal => Halt::Source("delete"),
        }
    }

    /// Begins a migration, and waits until it stands at this moment.
    pub async fn reach(self, pair: &Pair, what: Move) -> Process {
        let begin = |event: &str| {
            let variables = [("LIVEMIG_STAND_STILL", event)];
            let Move {
                engine,
                container,
                from,
                to,
            } = what;
            pair.spawn_migration_with(container, from, to, arguments(engine), &variables)
        };
        let (host, verb) = match self.halt(what.engine) {
            Halt::Event(event) => {
                let migration = begin(event);
                migration.stands_still().await;
                return migration;
            }
            Halt::Podman => {
                let destination = pair.host(what.to);
                let migration = begin("started:prepare");
                migration.stands_still().await;
                gate::signal_podman(destination, "STOP").await;
                migration.go_on();
                let journals = destination.path("/var/lib/livemig/journal/incoming");
                while std::fs::read_dir(&journals).is_ok_and(|mut files| files.next().is_none()) {
                    tokio::time::sleep(LOOK).await;
                }
                return migration;
            }
            Halt::Source(verb) => (pair.host(what.from), verb),
            Halt::Destination(verb) => (pair.host(what.to), verb),
        };
        let migration = if verb == CRIU {
            let migration = begin("started:hold");
            migration.stands_still().await;
            gate::close(host, verb).await;
            migration.go_on();
            migration
        } else {
            gate::close(host, verb).await;
            begin("")
        };
        gate::reached(host, verb).await;
        migration
    }

    /// The gate at which CRIU, or the runtime that calls it, waits at this moment.
    pub fn gate(self, what: Move) -> &'static str {
        match self.halt(what.engine) {
            Halt::Source(verb) | Halt::Destination(verb) => verb,
            Halt::Event(_) | Halt::Podman => panic!("nobody waits at a gate"),
        }
    }

    /// What lets it go on from there.
    pub fn way_on(self, pair: &Pair, what: Move) -> WayOn {
        WayOn {
            halt: self.halt(what.engine),
            source: pair.host(what.from).clone(),
            destination: pair.host(what.to).clone(),
        }
    }
}

/// Lets a migration go on that stands at a moment.
pub struct WayOn {
    halt: Halt,
    source: Node,
    destination: Node,
}

impl WayOn {
    /// Nothing is in its way any more.
    pub async fn open(&self, migration: Option<&Process>) {
        match self.halt {
            Halt::Event(_) => {
                if let Some(migration) = migration {
                    migration.go_on();
                }
            }
            Halt::Podman => gate::signal_podman(&self.destination, "CONT").await,
            Halt::Source(verb) => gate::open(&self.source, verb).await,
            Halt::Destination(verb) => gate::open(&self.destination, verb).await,
        }
    }
}
