from pifa_vllm.cli import main


def test_without_a_server_it_says_how_to_start_one(capsys):
    assert main(["chat", "--url", "http://127.0.0.1:9"]) == 1
    shown = capsys.readouterr().err
    assert "http://127.0.0.1:9: no server answers there" in shown
    assert "pifa-vllm serve" in shown
