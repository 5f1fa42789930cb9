//! What tests need to have things happen at a moment that they choose. Debug builds only.
//!
//! A migration that stands still at such a moment: `make test-faults` strikes it there, and not a millisecond
//! later. And a bound that is three minutes otherwise.

use std::time::Duration;

use livemig::Config;
use livemig::migration::Event;
use rustix::process::{Signal, getpid, kill_process};

/// The moment, as `started:PHASE` or `finished:PHASE`.
const MOMENT: &str = "LIVEMIG_STAND_STILL";

/// For how many milliseconds Podman at the destination is made to wait.
const PATIENCE: &str = "LIVEMIG_PODMAN_PATIENCE_MS";

/// The configuration, with what a test wants to be otherwise.
pub fn bounds(config: Config) -> Config {
    let asked = std::env::var(PATIENCE).ok();
    let asked = asked
        .and_then(|text| text.parse().ok())
        .map(Duration::from_millis);
    Config {
        podman_patience: asked.unwrap_or(config.podman_patience),
        ..config
    }
}

/// Stops the whole process if this is the moment, as SIGSTOP does, until somebody sends SIGCONT.
pub fn at(event: &Event) {
    let this = match event {
        Event::Started { phase } => format!("started:{phase}"),
        Event::Finished { phase, .. } => format!("finished:{phase}"),
        _ => return,
    };
    if std::env::var(MOMENT).is_ok_and(|moment| moment == this) {
        // To oneself this cannot fail.
        let _ = kill_process(getpid(), Signal::STOP);
    }
}
