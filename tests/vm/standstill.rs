//! Migrations that stand still at a chosen moment, in a machine. The command has to be a debug build:
//! `src/bin/livemig/standstill.rs`.

use super::Clock;
use super::lab::{LOOK, Node, Process};

/// A migration to come.
#[derive(Clone, Copy)]
pub struct Move<'a> {
    pub container: &'a str,
    pub from: &'a Node,
    /// What the source calls the destination.
    pub to: &'a str,
    pub engine: &'a str,
}

impl Move<'_> {
    /// Moves it, from the beginning to the end.
    pub async fn whole(self, clock: &Clock) {
        let arguments = self.arguments();
        clock.step(self.from.name(), &arguments.join(" "));
        self.from.exec(&arguments).await;
    }

    /// Begins to move it.
    pub fn begin(self, clock: &Clock) -> Process {
        let arguments = self.arguments();
        clock.step(self.from.name(), &arguments.join(" "));
        self.from.spawn_command(&arguments)
    }

    /// Begins to move it, and returns when that stands still at this moment.
    pub async fn until(self, clock: &Clock, moment: &str) -> Process {
        let arguments = self.arguments();
        clock.step(
            self.from.name(),
            &format!("{}, until it stands still: {moment}", arguments.join(" ")),
        );
        let variable = format!("LIVEMIG_STAND_STILL={moment}");
        let with_it = [&["env", &variable][..], &arguments].concat();
        let mut migration = self.from.spawn_command(&with_it);
        let still = self.its_process("case $(cut -d' ' -f3 /proc/$pid/stat) in T) exit 0;; esac");
        let still = self.from.sh(&format!("while sleep 0.05; do {still}; done"));
        let ends = async {
            while migration.is_running() {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            _ = still => migration,
            () = ends => panic!("it did not stand still (in an optimised build it cannot): {}", migration.finish().await),
        }
    }

    /// Lets it go on.
    pub async fn go_on(self) {
        self.from.sh(&self.its_process("kill -CONT $pid")).await;
    }

    fn arguments(&self) -> Vec<&str> {
        let (container, to, engine) = (self.container, self.to, self.engine);
        vec![
            "livemig", "migrate", container, "--to", to, "--engine", engine, "--json",
        ]
    }

    /// Does something with the process that moves it.
    fn its_process(&self, what: &str) -> String {
        format!(
            "for pid in $(pgrep -x livemig); do
                 ! tr '\\0' ' ' </proc/$pid/cmdline | grep -q 'migrate {} ' || {{ {what}; }}
             done",
            self.container
        )
    }
}
