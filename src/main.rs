//! The program: commands over the library's public API, and nothing that callers of the library could not do.

mod bench;
mod cli;
mod server;

fn main() -> std::process::ExitCode {
    cli::main()
}
