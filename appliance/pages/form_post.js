// The one script of the login: it presses the button that is there for those without it.
document.getElementById("answer").submit();
