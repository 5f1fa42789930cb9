//! Plain tables: columns as wide as their widest cell, no frame. On a terminal that is too narrow for
//! that, the widest columns break their lines; into a pipe a row stays a line.

/// No column is made narrower than this for a terminal's sake.
const NARROWEST: usize = 16;
/// Between two columns.
const GAP: usize = 2;

/// Rows under a heading.
pub struct Table {
    rows: Vec<Vec<String>>,
    width: Option<usize>,
}

impl Table {
    /// A table with these columns, for where standard output goes.
    pub fn new(heading: &[&str]) -> Table {
        Table {
            rows: vec![heading.iter().map(|title| title.to_uppercase()).collect()],
            width: terminal_width(),
        }
    }

    /// One more row. A line feed in a cell begins a new line of the cell.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }

    /// How wide each column is to be.
    fn widths(&self) -> Vec<usize> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut widths: Vec<usize> = (0..columns)
            .map(|column| {
                let cells = self.rows.iter().filter_map(|row| row.get(column));
                let lines = cells.flat_map(|cell| cell.lines());
                lines.map(|line| line.chars().count()).max().unwrap_or(0)
            })
            .collect();
        let Some(limit) = self.width else {
            return widths;
        };
        while widths.iter().map(|width| width + GAP).sum::<usize>() > limit + GAP {
            match widths.iter_mut().max() {
                Some(widest) if *widest > NARROWEST => *widest -= 1,
                _ => break,
            }
        }
        widths
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let widths = self.widths();
        for row in &self.rows {
            let cells: Vec<Vec<String>> = row
                .iter()
                .zip(&widths)
                .map(|(cell, width)| cell.lines().flat_map(|line| wrap(line, *width)).collect())
                .collect();
            let height = cells.iter().map(Vec::len).max().unwrap_or(0);
            for at in 0..height {
                let mut line = String::new();
                for (cell, width) in cells.iter().zip(&widths) {
                    let text = cell.get(at).map_or("", String::as_str);
                    line.push_str(&format!("{text:width$}{:GAP$}", ""));
                }
                writeln!(f, "{}", line.trim_end())?;
            }
        }
        Ok(())
    }
}

/// Breaks a line between words; a word that is too long stays whole if it is the only one.
fn wrap(line: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in line.split(' ') {
        let last = lines.last_mut().filter(|last| {
            last.is_empty() || last.chars().count() + 1 + word.chars().count() <= width
        });
        match last {
            Some(last) if last.is_empty() => last.push_str(word),
            Some(last) => {
                last.push(' ');
                last.push_str(word);
            }
            None => lines.push(word.to_owned()),
        }
    }
    lines
}

/// How many characters fit into a line: what `COLUMNS` says, else the terminal, if it is one.
fn terminal_width() -> Option<usize> {
    let told = std::env::var("COLUMNS").ok();
    told.and_then(|columns| columns.parse().ok()).or_else(|| {
        let size = rustix::termios::tcgetwinsize(std::io::stdout()).ok()?;
        Some(usize::from(size.ws_col)).filter(|columns| *columns > 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(width: Option<usize>) -> String {
        let mut table = Table::new(&["", "what", "what to do"]);
        table.width = width;
        let what = "the destination has a volume data already".to_owned();
        let next = "remove or rename it there: podman volume rm data".to_owned();
        table.row(["no".to_owned(), what, next]);
        table.row(["".to_owned(), "two\nlines".to_owned(), "-".to_owned()]);
        table.to_string()
    }

    #[test]
    fn a_row_is_a_line_where_nobody_says_how_wide_a_line_is() {
        assert_eq!(
            table(None),
            "    WHAT                                       WHAT TO DO
no  the destination has a volume data already  remove or rename it there: podman volume rm data
    two                                        -
    lines
"
        );
    }

    #[test]
    fn wide_columns_break_their_lines() {
        assert_eq!(
            table(Some(50)),
            "    WHAT                    WHAT TO DO
no  the destination has a   remove or rename it
    volume data already     there: podman volume
                            rm data
    two                     -
    lines
"
        );
        assert!(table(Some(5)).lines().all(|line| line.len() < 50));
    }
}
