//! What is asked of a migration.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::engine::Engine;
use super::event::Phase;
use crate::{Config, Error};

/// In how many rounds memory is copied at most, unless something else is asked for: as in CRIU's p.haul. What
/// is written to as fast as it is sent never gets less.
pub const MOST_ROUNDS: usize = 8;

/// How long a container may answer nobody unless something else is asked for: what QEMU and Cloud Hypervisor
/// have for virtual machines (`downtime-limit`, `downtime_ms`).
pub const MAX_DOWNTIME: Duration = Duration::from_millis(300);

/// What happens when no more packets can wait: when one of the bounds
/// [`Config::hold_packets`](crate::Config::hold_packets) and
/// [`Config::hold_bytes`](crate::Config::hold_bytes) is reached.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The newest packets are dropped, as on any network that is too slow, and the migration goes
    /// on.
    #[default]
    Drop,
    /// The migration is given up, and the container goes on here, unless its peers have heard it at
    /// the destination already.
    GiveUp,
}

/// What happens when the downtime is going to be longer than it may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WhenOver {
    /// The migration goes on: it takes as long as it takes.
    #[default]
    GoOn,
    /// The migration is given up before the container is stopped.
    GiveUp,
}

/// A container to move, and where to.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Request {
    /// Name or ID of a running container.
    pub container: String,
    /// Name of a host that was joined.
    pub to: String,
    /// Paths and bounds on this host.
    pub config: Config,
    /// Whether the container's named volumes stay on this host as well. Otherwise they are removed
    /// after the move, unless another container uses them.
    pub keep_volumes: bool,
    /// Whether connections that came through this host go on doing so. Otherwise the hosts where they
    /// began send them straight to the destination, and this one can be switched off.
    pub keep_chain: bool,
    /// What happens when no more packets can wait.
    pub when_full: WhenFull,
    /// Whether new connections to the container's published ports at the source go on to it, through
    /// the tunnel, until [`stop_forwarding`](super::stop_forwarding). Otherwise they are refused.
    pub forward_new: bool,
    /// How the processes cross. Otherwise the best way that both hosts are set up for.
    pub engine: Option<Engine>,
    /// How long the container may answer nobody. Rounds of copying are made until what is left fits.
    pub max_downtime: Duration,
    /// What happens if it never does.
    pub when_over: WhenOver,
    /// No more rounds of copying memory than this.
    pub most_rounds: usize,
    /// Let the container run at the destination before its memory is there (direct engine only): what it
    /// touches is fetched, and the rest follows. If the hosts lose each other before all of it is there, the
    /// container is lost.
    pub post_copy: bool,
    /// Undo everything at the end of this phase, to see how the move would go.
    ///
    /// [`Phase::Restore`] is the last that can be: afterwards peers have heard the copy at the
    /// destination, and could not go on with the container as it was when it was frozen.
    pub rehearse: Option<Phase>,
    /// Cancelled, the migration undoes what it has done and ends with
    /// [`Error::RolledBack`], unless it is past its point of no return.
    pub cancel: CancellationToken,
}

impl Request {
    /// Moves `container` to the host known here as `to`, with the default [`Config`].
    pub fn new(container: impl Into<String>, to: impl Into<String>) -> Request {
        Request {
            container: container.into(),
            to: to.into(),
            config: Config::default(),
            keep_volumes: false,
            forward_new: false,
            keep_chain: false,
            when_full: WhenFull::default(),
            engine: None,
            max_downtime: MAX_DOWNTIME,
            when_over: WhenOver::default(),
            most_rounds: MOST_ROUNDS,
            post_copy: false,
            rehearse: None,
            cancel: CancellationToken::new(),
        }
    }

    /// With other paths and bounds.
    pub fn config(mut self, config: Config) -> Request {
        self.config = config;
        self
    }

    /// Leaving named volumes behind as well, or not.
    pub fn keep_volumes(mut self, keep: bool) -> Request {
        self.keep_volumes = keep;
        self
    }

    /// Whether new connections to the source go on to the container.
    #[must_use]
    pub fn forward_new(mut self, forward: bool) -> Request {
        self.forward_new = forward;
        self
    }

    /// Leaving the paths of older connections as long as they are, or not.
    pub fn keep_chain(mut self, keep: bool) -> Request {
        self.keep_chain = keep;
        self
    }

    /// Dropping packets, or giving up, when no more can wait.
    pub fn when_full(mut self, policy: WhenFull) -> Request {
        self.when_full = policy;
        self
    }

    /// With this engine, or else the best that both hosts have.
    pub fn engine(mut self, engine: Option<Engine>) -> Request {
        self.engine = engine;
        self
    }

    /// Answering nobody for no longer than this, if that can be had.
    pub fn max_downtime(mut self, budget: Duration) -> Request {
        self.max_downtime = budget;
        self
    }

    /// Copying memory no more often than this while the container runs.
    pub fn most_rounds(mut self, rounds: usize) -> Request {
        self.most_rounds = rounds;
        self
    }

    /// Going on, or giving up, when the downtime is going to be longer.
    pub fn when_over(mut self, policy: WhenOver) -> Request {
        self.when_over = policy;
        self
    }

    /// Fetching memory when the container runs already, or not.
    pub fn post_copy(mut self, post_copy: bool) -> Request {
        self.post_copy = post_copy;
        self
    }

    /// Undoing everything at the end of this phase.
    pub fn rehearse(mut self, phase: Option<Phase>) -> Request {
        self.rehearse = phase;
        self
    }

    /// Stopping when this token is cancelled.
    pub fn cancel(mut self, token: CancellationToken) -> Request {
        self.cancel = token;
        self
    }

    /// Why it is given up when no more packets can wait.
    pub(super) fn hold_full(&self) -> Error {
        Error::HoldFull {
            packets: self.config.hold_packets,
            bytes: self.config.hold_bytes,
        }
    }
}
