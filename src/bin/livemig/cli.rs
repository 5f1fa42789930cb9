//! The arguments of the command.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand};
use livemig::Config;
use livemig::agent::{PeerName, Permission};
use livemig::migration::{Engine, Keep, Phase, Privilege, WhenFull, WhenOver};

/// Moves a running Podman container to another host while its TCP and UDP peers go on talking to it
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, long_about = ABOUT, after_help = EXIT_CODES)]
pub struct Cli {
    /// Print one JSON document (for `migrate`, one JSON object a line) instead of text
    #[arg(long, global = true)]
    pub json: bool,

    /// Tell on standard error what goes on inside; twice for more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,

    // Last, for its heading holds for what comes after it.
    #[command(flatten)]
    pub place: Place,

    #[command(subcommand)]
    pub command: Command,
}

const ABOUT: &str = "\
Moves a running Podman container to another host while its TCP and UDP peers go on talking to it.

Once, for each pair of hosts:

  host-b# livemig agent &                 # or the systemd unit
  host-b# livemig invite                  # prints a token, good for one use
  host-a# livemig join TOKEN --name host-b

Then, whenever a container has to move:

  host-a# livemig check web --to host-b   # looks, changes nothing
  host-a# livemig migrate web --to host-b";

const MIGRATE_JSON: &str = "\
With --json, standard output has an object a line, each with the field `event`:
  started, finished       a phase begins, has ended (`phase`, `ms`)
  sent                    bytes have gone to the destination (`what`, `bytes`, `total`)
  warning                 something to know (`finding`)
  rolling-back, undone    a step failed (`cause`); one change is undone (`effect`, `failure`)
  report                  the last line when the container has moved (`report`)
  error                   the last line when it has not (`code`, `exit_code`, `error`, `hint`, `findings`)";

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    an unexpected failure
  2    the arguments make no sense
  3    refused by a check; nothing was changed
  4    a host cannot be reached, or does not trust this one; nothing was changed
  5    it failed on the way; everything was undone and the container runs on at the source
  6    it failed on the way, and something could not be undone: the message lists what
  7    it is not known which host runs the container: see `livemig recover --help`
  8    the container moved, but something at the source could not be tidied: the message lists what
  130  interrupted; everything was undone and the container runs on at the source";

/// Where things are on this host.
#[derive(Debug, Args)]
#[command(next_help_heading = "Places")]
pub struct Place {
    /// Podman's API socket
    #[arg(
        long,
        global = true,
        env = "LIVEMIG_PODMAN_SOCKET",
        value_name = "PATH",
        default_value = "/run/podman/podman.sock"
    )]
    pub podman_socket: PathBuf,

    /// This host's key, its peers, open invitations, the journal
    #[arg(
        long,
        global = true,
        env = "LIVEMIG_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/lib/livemig"
    )]
    pub state_dir: PathBuf,

    /// Hops, locks, files on their way
    #[arg(
        long,
        global = true,
        env = "LIVEMIG_RUN_DIR",
        value_name = "DIR",
        default_value = "/run/livemig"
    )]
    pub run_dir: PathBuf,

    /// First UDP port tried for a tunnel to another host
    #[arg(long, global = true, env = "LIVEMIG_TUNNEL_PORT", value_name = "PORT", default_value_t = livemig::tunnel::Settings::FIRST_PORT)]
    pub tunnel_port: u16,
}

impl Place {
    /// What the library needs to know of them.
    pub fn config(&self) -> Config {
        Config {
            podman_socket: self.podman_socket.clone(),
            state_dir: self.state_dir.clone(),
            run_dir: self.run_dir.clone(),
            tunnel_port: self.tunnel_port,
            ..Config::default()
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Receive containers from the hosts that this one trusts
    Agent {
        /// Address and TCP port to listen on
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "[::]:27757")]
        listen: std::net::SocketAddr,

        /// Take containers that have this; by default none that could do more here than others
        ///
        /// privileged: all privileges. capabilities: more than Podman gives every container. devices:
        /// devices of this host. secrets: this host's secrets. unconfined: loosened by
        /// --security-opt. host-namespaces: this host's host name or cgroups. Repeat it for each
        #[arg(long, value_name = "WHAT", value_delimiter = ',')]
        allow: Vec<Privilege>,

        /// Take containers that have this directory of this host, or something below it, mounted
        ///
        /// Without this, none that have any bind mount. Repeat it for each directory
        #[arg(long, value_name = "DIR")]
        allow_bind: Vec<PathBuf>,

        /// How many migrations may be coming here at one time
        #[arg(long, value_name = "N", default_value_t = 16,
              value_parser = clap::value_parser!(u16).range(1..))]
        incoming: u16,
    },

    /// Print a token with which one other host can join this one
    Invite {
        /// Where the other host reaches this one's agent, as HOST or HOST:PORT
        ///
        /// Default: the address that this host uses towards the outside.
        #[arg(long, value_name = "HOST[:PORT]")]
        address: Option<String>,

        /// How long the token is good for, as in 90s, 15m, 2h
        #[arg(long, value_name = "TIME", default_value = "15m", value_parser = duration)]
        valid: Duration,
    },

    /// Accept an invitation: from then on, containers can be sent to the host that gave it
    Join {
        /// What `livemig invite` printed on the other host
        token: String,

        /// What to call the other host here
        ///
        /// Default: the name or address in the token.
        #[arg(long)]
        name: Option<String>,

        /// Where the other host reaches this one's agent, if containers are to come back
        #[arg(long, value_name = "HOST[:PORT]")]
        address: Option<String>,
    },

    /// List the hosts that this one trusts
    Hosts,

    /// Say what another host may do with this one
    ///
    /// What is not named it may not do any more. A host that was invited, or has joined, may send and
    /// receive.
    Allow {
        /// Its name here: one from `livemig hosts`
        host: String,

        /// send: it may send containers here. receive: it may receive containers from here.
        /// introduce: it may introduce hosts to this one, so that connections of a container that
        /// moves on from it take the direct way; they may do nothing else
        #[arg(value_name = "send|receive|introduce", num_args = 0..)]
        may: Vec<Permission>,
    },

    /// Trust another host no more
    ///
    /// Its key is forgotten first: whatever it asks from then on is refused. Open
    /// invitations are withdrawn, for it may have a token. What it had only prepared here is undone, new connections are not carried to it or from it any more, and the tunnel to it
    /// is taken down, unless connections go through it: then they are listed, and the tunnel goes when
    /// they have ended. The other host is not told; run this there as well.
    Revoke {
        /// Its name here: one from `livemig hosts`; or its fingerprint
        host: String,

        /// Cut off the connections that go through the tunnel to it, and take that down at once
        #[arg(long)]
        now: bool,
    },

    /// Give this host another key, without losing the trust of those who know it
    ///
    /// Each host that is known is told of the new key by the old one, and accepts both until it sees the
    /// new one. When all have been told the new key takes the place of the old one, of which nothing is
    /// left. A running agent needs no restart, and migrations go on. If a host cannot be told the key
    /// stays as it is: run this again, it goes on from where it was. For a key that somebody else may
    /// have, revoke it on all hosts instead, and join them anew.
    Rekey {
        /// Do it though this host cannot be told: it has to be joined anew afterwards
        #[arg(long, value_name = "HOST")]
        without: Vec<PeerName>,
    },

    /// Move a running container to another host
    #[command(after_long_help = MIGRATE_JSON)]
    Migrate {
        #[command(flatten)]
        what: Move,

        /// Leave the container's named volumes behind on this host as well
        ///
        /// Their content goes to the destination in any case. Without this they are removed here,
        /// unless another container uses them: what is left would be out of date from the first
        /// write over there, and in the way when the container comes back.
        #[arg(long)]
        keep_volumes: bool,

        /// Let connections that came here from other hosts go on through this one
        ///
        /// Without this, the hosts where they began send them straight to the destination, and this
        /// host is not needed any more.
        #[arg(long)]
        keep_chain: bool,

        /// What to do when more is sent to the container than can wait while it moves
        #[arg(long, value_name = "POLICY", default_value = "drop")]
        when_full: Policy,

        /// How many packets may wait while the container moves
        #[arg(long, value_name = "N", default_value_t = livemig::conntrack::hold::DEFAULT_PACKETS,
              value_parser = clap::value_parser!(u32).range(1..))]
        hold_packets: u32,

        /// How many MiB of packets may wait while the container moves
        #[arg(long, value_name = "N", default_value_t = livemig::conntrack::hold::DEFAULT_BYTES >> 20,
              value_parser = clap::value_parser!(u64).range(1..1 << 20))]
        hold_mib: u64,

        /// Carry new connections to the container's ports on this host to it, through the tunnel
        ///
        /// Until `livemig flows --stop-forwarding`. Without this they are refused, as by a port that
        /// nobody listens on, and another container can have the port.
        #[arg(long)]
        forward_new: bool,

        /// How the container's processes cross
        ///
        /// Without this, `direct` where both hosts are set up for it (see `livemig setup --help`), else
        /// `rest`.
        #[arg(long, value_name = "ENGINE")]
        engine: Option<EngineName>,

        /// How long the container may answer nobody, in milliseconds
        ///
        /// Memory is copied while it runs, again and again, until what is left fits into this time; where
        /// the kernel cannot tell what was written to (no soft-dirty bits), it is copied once, in the
        /// downtime. Direct engine only.
        #[arg(long, value_name = "MS", default_value_t = livemig::migration::MAX_DOWNTIME.as_millis() as u64)]
        max_downtime: u64,

        /// Copy memory no more often than this while the container runs; 0: not at all
        #[arg(long, value_name = "N", default_value_t = livemig::migration::MOST_ROUNDS)]
        rounds: usize,

        /// What to do when the downtime is going to be longer than that
        #[arg(long, value_name = "POLICY", default_value = "go-on")]
        when_over: OverPolicy,

        /// Let the container run at the destination before its memory is there
        ///
        /// What it touches is fetched, and the rest follows: the downtime is that of a small container,
        /// however much memory there is. But until all of it is there the container needs both hosts and
        /// the network between them. If one of them fails in that time, the container is lost: its peers
        /// have heard what it did over there, so what is frozen here cannot go on. Direct engine only.
        #[arg(long)]
        post_copy: bool,

        /// Go as far as the end of this phase, then undo everything
        ///
        /// The container stays here and its connections stay open: a way to see how long the move
        /// would interrupt it. Phases: preflight, prepare, precopy, hold, freeze, transfer, restore.
        /// Not steer and commit: once packets are let go, peers have heard the container at the
        /// destination, and there is no way back.
        #[arg(long, value_name = "PHASE")]
        rehearse: Option<Phase>,

        /// Write the report of a migration that went well into this file as well, as JSON
        #[arg(long, value_name = "FILE")]
        report: Option<PathBuf>,
    },

    /// Look whether a container could move, and say what stands in the way
    ///
    /// Changes nothing. The exit code is 0 if it could, 3 if something stands in the way; warnings do
    /// not count.
    Check(Move),

    /// Show every change that a migration would make on both hosts, and how each is undone
    Plan(Move),

    /// List the containers of this host, and what a migration would take along
    Ps,

    /// List the connections of containers, and the hop that each one takes
    Flows {
        /// Only those of this container
        container: Option<String>,

        /// Show them again and again, every so often, as in 1s; with --json, a list a line
        #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "1s", value_parser = duration)]
        watch: Option<Duration>,

        /// Carry no more new connections to where this container went (or to where any did)
        ///
        /// Ends what `livemig migrate --forward-new` began. Connections that are open go on.
        #[arg(long, conflicts_with = "watch")]
        stop_forwarding: bool,
    },

    /// Finish or undo what an interrupted migration left on this host
    ///
    /// Reads the journal. A migration that was past its point of no return is finished; any other is
    /// undone, after the destination has given up its copy.
    ///
    /// If the destination does not answer, it may run the container, and nothing is done to that: it stays
    /// frozen here, its packets wait or are sent again by its peers, and the exit code is 7. See to it that
    /// the destination answers, and run this again. If it never will, --keep decides.
    Recover {
        /// Which host is to have a container when the destination does not say whether it runs there
        ///
        /// Silence the other host first: cut its power, or its network. source: the container goes on
        /// here, as it was when it was frozen; whatever the copy says through this host is dropped from
        /// then on, but what it says elsewhere cannot be; the destination is told to give it up for five
        /// seconds, and again whenever this is run, until it has (exit code 6 until then). destination:
        /// the container here is removed; refused if the destination answers that it does not run it.
        #[arg(long, value_name = "source|destination", hide_possible_values = true)]
        keep: Option<Which>,
    },

    /// Put livemig between Podman and its runtime, for the direct engine
    ///
    /// The container that is moved is then made at the destination while it still runs here, and its
    /// memory goes straight from CRIU to CRIU. Needed on both hosts. Podman goes on working as before,
    /// and containers that run already can be moved; but Podman's service has to be restarted, for it
    /// reads its configuration when it starts: systemctl restart podman.service
    ///
    /// It writes a drop-in for containers.conf, and nothing into files that are not livemig's. Done
    /// again, it does nothing.
    Setup {
        /// Take it away again
        #[arg(long)]
        remove: bool,
    },

    /// Print a completion script for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },

    /// Be the userspace WireGuard device of one hop (started by livemig itself)
    #[command(hide = true)]
    TunnelDevice {
        /// The interface to make
        interface: String,
        /// The socket it is controlled by
        socket: PathBuf,
    },
}

/// How processes cross.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineName {
    /// By Podman's own export and import, on hosts as they are
    Rest,
    /// Straight from CRIU to CRIU, into a container that is there already
    Direct,
}

impl From<EngineName> for Engine {
    fn from(name: EngineName) -> Engine {
        match name {
            EngineName::Rest => Engine::Rest,
            EngineName::Direct => Engine::Direct,
        }
    }
}

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Which {
    /// The one that the container was to leave
    Source,
    /// The one that it was to go to
    Destination,
}

impl From<Which> for Keep {
    fn from(which: Which) -> Keep {
        match which {
            Which::Source => Keep::Source,
            Which::Destination => Keep::Destination,
        }
    }
}

/// What happens when no more packets can wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// The newest packets are dropped, and the migration goes on
    Drop,
    /// The migration is given up, and the container goes on here
    GiveUp,
}

impl From<Policy> for WhenFull {
    fn from(policy: Policy) -> WhenFull {
        match policy {
            Policy::Drop => WhenFull::Drop,
            Policy::GiveUp => WhenFull::GiveUp,
        }
    }
}

/// What happens when the downtime is going to be too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OverPolicy {
    /// The migration goes on
    GoOn,
    /// The migration is given up, before the container is stopped
    GiveUp,
}

impl From<OverPolicy> for WhenOver {
    fn from(policy: OverPolicy) -> WhenOver {
        match policy {
            OverPolicy::GoOn => WhenOver::GoOn,
            OverPolicy::GiveUp => WhenOver::GiveUp,
        }
    }
}

/// What moves where.
#[derive(Debug, Args)]
pub struct Move {
    /// Name or ID of a running container
    pub container: String,

    /// The host to move it to: a name from `livemig hosts`
    #[arg(long, value_name = "HOST")]
    pub to: String,
}

/// Reads 90s, 15m, 2h or a plain number of seconds.
fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(
        text.trim_end_matches(|c: char| c.is_ascii_alphabetic())
            .len(),
    );
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => {
            return Err(format!(
                "`{unit}` is not a unit of time; use s, m or h, as in 15m"
            ));
        }
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "give a whole number and a unit, as in 15m".to_owned())?;
    number
        .checked_mul(seconds)
        .filter(|seconds| (1..=7 * 24 * 3600).contains(seconds))
        .map(Duration::from_secs)
        .ok_or_else(|| "it must lie between 1 second and 7 days".to_owned())
}
