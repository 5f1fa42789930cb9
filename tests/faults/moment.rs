//! The moments at which a migration is struck: one in each phase, where most is at stake, and one more
//! past the point of no return.

use super::lab::pair::Pair;
use super::lab::{LOOK, Process, gate};

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
    /// Packets wait, the processes stand still, Podman's runtime is about to dump them.
    Freeze,
    /// They are dumped, and the connections marked.
    Transfer,
    /// The destination has all of the container, and its Podman's runtime is about to restore it.
    Restore,
    /// The copy runs, and nobody has heard it.
    Steer,
    /// The copy has been heard, and the source has not written that down.
    Commit,
    /// It has, and its Podman is removing the old container.
    Removal,
}

/// How the migration is made to stand still there.
enum Halt {
    /// By itself, as it tells of this event.
    Event(&'static str),
    /// Because the destination's Podman does not answer.
    Podman,
    /// At the gate before this verb of a host's runtime.
    Gate(usize, &'static str),
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

    fn halt(self) -> Halt {
        match self {
            Moment::Preflight => Halt::Event("started:preflight"),
            Moment::Prepare => Halt::Podman,
            Moment::Precopy => Halt::Event("started:precopy"),
            Moment::Hold => Halt::Event("finished:hold"),
            Moment::Freeze => Halt::Gate(1, "checkpoint"),
            Moment::Transfer => Halt::Event("started:transfer"),
            Moment::Restore => Halt::Gate(2, "restore"),
            Moment::Steer => Halt::Event("started:steer"),
            Moment::Commit => Halt::Event("started:commit"),
            Moment::Removal => Halt::Gate(1, "delete"),
        }
    }

    /// Begins to move the container from the first host to the second, and waits until the migration
    /// stands at this moment.
    pub async fn reach(self, pair: &Pair, engine: &str, container: &str) -> Process {
        let begin = |event: &str| {
            let variables = [("LIVEMIG_STAND_STILL", event)];
            pair.spawn_migration_with(container, 1, 2, &["--engine", engine], &variables)
        };
        match self.halt() {
            Halt::Event(event) => {
                let migration = begin(event);
                migration.stands_still().await;
                migration
            }
            Halt::Podman => {
                let migration = begin("started:prepare");
                migration.stands_still().await;
                gate::signal_podman(pair.host(2), "STOP").await;
                migration.go_on();
                let journals = pair.host(2).path("/var/lib/livemig/journal/incoming");
                while std::fs::read_dir(&journals).is_ok_and(|mut files| files.next().is_none()) {
                    tokio::time::sleep(LOOK).await;
                }
                migration
            }
            Halt::Gate(host, verb) => {
                gate::close(pair.host(host), verb).await;
                let migration = begin("");
                gate::reached(pair.host(host), verb).await;
                migration
            }
        }
    }

    /// What lets it go on from there.
    pub fn way_on(self, pair: &Pair) -> WayOn {
        WayOn {
            halt: self.halt(),
            hosts: [pair.host(1).clone(), pair.host(2).clone()],
        }
    }
}

/// Lets a migration go on that stands at a moment.
pub struct WayOn {
    halt: Halt,
    hosts: [super::lab::Node; 2],
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
            Halt::Podman => gate::signal_podman(&self.hosts[1], "CONT").await,
            Halt::Gate(host, verb) => gate::open(&self.hosts[host - 1], verb).await,
        }
    }
}
